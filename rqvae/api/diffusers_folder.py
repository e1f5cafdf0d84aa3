"""Folders of huggingface/diffusers: loaded as they are, and our KL-VAE written as one and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rqvae.api import exported
from rqvae.api.card import write_card
from rqvae.api.pipeline import Pipeline
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec
from rqvae.models.connectors.scale_shift import ScaleShift
from rqvae.models.stage1 import diffusers_vae
from rqvae.models.stage1.diffusers_source import CONFIG, read_config
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage1.kl_vae_export import from_diffusers, klvae_arguments, to_diffusers

WRAPPERS: dict[str, type[diffusers_vae.DiffusersStage1]] = {
    "AutoencoderKL": diffusers_vae.AutoencoderKLStage1,
    "AutoencoderDC": diffusers_vae.AutoencoderDCStage1,
    "AutoencoderTiny": diffusers_vae.AutoencoderTinyStage1,
}


def wrap_diffusers(folder: Path) -> Pipeline:
    """The autoencoder of a folder in its wrapper; `spec` has the image size that its config states.

    Raises:
        BadInput: another model of diffusers than the wrappers are for.
    """
    config = read_config(folder)
    wrapper = WRAPPERS.get(config["_class_name"])
    if wrapper is None:
        raise BadInput(
            f"{folder / CONFIG}: _class_name: expected one of {', '.join(WRAPPERS)}, got {config['_class_name']}"
        )
    stage1: Any = wrapper
    part = {"class_path": f"{wrapper.__module__}.{wrapper.__name__}", "init_args": {"source": str(folder)}}
    spec = _spec(config)
    description = exported.Description(spec, {"stage1": part}, {"diffusers": config["_class_name"]})
    return Pipeline(spec, stage1(source=str(folder)).eval(), None, description)


def read_as_klvae(folder: Path) -> Pipeline:
    """A folder's `AutoencoderKL` as our `KLVAE`, with identical weights.

    The latent scale of the folder, which a KLVAE has no place for, is kept in the description's source.

    Raises:
        BadInput: layers that KLVAE does not have; see `rqvae.models.stage1.kl_vae_export.from_diffusers`.
    """
    model = from_diffusers(folder)
    config = read_config(folder)
    part = {"class_path": f"{KLVAE.__module__}.{KLVAE.__name__}", "init_args": klvae_arguments(folder)}
    scale = {k: config[k] for k in ("scaling_factor", "shift_factor", "latents_mean", "latents_std") if config.get(k)}
    source = {"diffusers": config["_class_name"], **({"latent_scale": scale} if scale else {})}
    return Pipeline(_spec(config), model, None, exported.Description(_spec(config), {"stage1": part}, source))


def write_diffusers(pipeline: Pipeline, folder: Path, licence: str = "unknown") -> None:
    """A pipeline's `KLVAE` as a folder for `diffusers.AutoencoderKL.from_pretrained`, with a model card.

    Under a generator with a `ScaleShift` connector the statistics go along, as `latents_mean` and `latents_std`.

    Raises:
        BadInput: another Stage1 than KLVAE, or a folder with files in it.
    """
    if not isinstance(pipeline.stage1, KLVAE):
        name = type(pipeline.stage1).__name__
        raise BadInput(f"--format diffusers: expected a KLVAE, the only model with a form in diffusers, got {name}")
    exported.check_new(folder)
    connector = pipeline.two_stage.connector if pipeline.two_stage is not None else None
    scale = {"mean_c": connector.mean, "std_c": connector.std} if isinstance(connector, ScaleShift) else {}
    _, height, width = pipeline.spec.image_shape
    to_diffusers(pipeline.stage1, folder, sample_size=max(height, width), **scale)
    if pipeline.description is not None:
        write_card(folder, pipeline.description, pipeline.stage1, None, licence, for_diffusers=True)


def _spec(config: dict[str, Any]) -> DataSpec:
    """The image size of a config.json; diffusers' own default is 32, and the published ones state 256 and more."""
    size = config.get("sample_size", 32)
    height, width = size if isinstance(size, list) else (size, size)
    return DataSpec((3, height, width))
