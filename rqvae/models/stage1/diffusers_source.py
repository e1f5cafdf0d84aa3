"""Where the weights of a diffusers autoencoder come from: a local folder, or the Hugging Face hub.

A folder is what `ModelMixin.save_pretrained` of huggingface/diffusers writes: config.json and
diffusion_pytorch_model.safetensors, in one file or in shards with an index. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from torch import Tensor

from rqvae.errors import BadInput

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FILES = (CONFIG, WEIGHTS, INDEX, "diffusion_pytorch_model-*-of-*.safetensors")
HOW_TO = f"or give the path of a folder with {CONFIG} and {WEIGHTS}"


def find_folder(source: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The local folder with config.json and weights; downloads them where `source` is a hub id.

    The hub's cache (HF_HOME), offline mode (HF_HUB_OFFLINE=1) and token (HF_TOKEN) are those of huggingface_hub.

    Args:
        source: an existing folder, or a hub id `owner/name`.
        subfolder: below it, for example "vae" of a pipeline.
        revision: branch, tag or commit of a hub id.

    Raises:
        BadInput: no such folder, a revision of a folder, or a hub repository that cannot be had.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        if revision is not None:
            raise BadInput(f"stage1.revision: expected null for the local folder {source}, got {revision!r}")
        return root / (subfolder or "")
    if root.is_absolute() or source.startswith((".", "~")):
        raise BadInput(f"stage1.source: expected a folder or a hub id owner/name, got {source}, which does not exist")
    return _download(source, revision, f"{subfolder}/" if subfolder else "") / (subfolder or "")


def _download(hub_id: str, revision: str | None, prefix: str) -> Path:
    patterns = [prefix + name for name in FILES]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    # Releases below 1 pass on the errors of requests, later ones those of httpx, and their own have no common base.
    except Exception as error:
        raise BadInput(_hub_problem(hub_id, revision, error)) from error


def _hub_problem(hub_id: str, revision: str | None, error: Exception) -> str:
    """One line that says what to do; the error's own text, which may quote a request, is left out."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return f"stage1.source: expected a folder or a hub id owner/name, got {hub_id!r}"
    if isinstance(error, RevisionNotFoundError):
        return f"stage1.revision: expected a branch, tag or commit of {hub_id}, got {revision!r}"
    if isinstance(error, RepositoryNotFoundError | GatedRepoError) or status in (401, 403):
        return (
            f"stage1.source: expected a hub repository that may be read, got {hub_id} (not found, private or gated): "
            f"accept its terms and set HF_TOKEN, {HOW_TO}"
        )
    return (
        f"stage1.source: expected {hub_id} from the Hugging Face hub or its cache, got {type(error).__name__}: connect "
        f"once with HF_HUB_OFFLINE unset, {HOW_TO}"
    )


def load_model(kind: type[Any], folder: Path) -> Any:
    """A diffusers model in float32 and eval mode, every tensor of which comes from the folder's safetensors.

    Typed `Any`: type checkers see the placeholders that diffusers exports where torch is missing.

    Args:
        kind: the class that config.json names.
        folder: with config.json and the weights.

    Raises:
        BadInput: no or another config.json, no safetensors, or tensors that are missing, left over or of other shapes.
    """
    config = read_config(folder)
    if config.get("_class_name") != kind.__name__:
        raise BadInput(f"{folder / CONFIG}: expected _class_name {kind.__name__}, got {config.get('_class_name')!r}")
    if not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        raise BadInput(f"{folder}: expected {WEIGHTS} (pickled weights are not read), got no such file")
    try:
        # A configuration is checked on meta tensors; the weights are checked with it, on the host.
        with torch.device("cpu"):
            # Its own loader, as it renames the attention layers of files from before diffusers 0.17 (sd-vae-ft-mse).
            model, found = kind.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{folder}: expected an {kind.__name__} that diffusers can load, got: {reason}") from error
    # diffusers only warns and leaves random numbers.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, found[problem])):
            raise BadInput(
                f"{folder}: expected the tensors of {kind.__name__}, got {len(keys)} {problem.replace('_', ' ')}, "
                f"first {keys[0]}"
            )
    return model.to(torch.empty(()).device)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        BadInput: no such file, or not a JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: expected the configuration of a diffusers autoencoder, got no such file") from error
    except ValueError as error:
        raise BadInput(f"{path}: expected a JSON object, got {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def latent_scale(config: Mapping[str, Any], channels: int, where: str) -> tuple[Tensor, Tensor] | None:
    """The numbers by which the pipelines of diffusers normalise a latent, as (z - mean) / std.

    The formulas in diffusers 0.36: `z * scaling_factor` (Stable Diffusion, Sana), `(z - shift_factor) *
    scaling_factor` (pipeline_stable_diffusion_3_img2img.py, pipeline_flux_img2img.py) and `(z - latents_mean) *
    scaling_factor / latents_std` (pipeline_stable_diffusion_xl_img2img.py).

    Args:
        config: of the model, with diffusers' defaults filled in: sd-vae-ft-mse has no scaling_factor in its file, and
            its pipelines use the default of 0.18215.
        channels: C.
        where: for errors, the file it is of.

    Returns:
        Mean and std, each (C,) float64 on the host; None where the configuration has no scale (`scaling_factor: null`).

    Raises:
        BadInput: half a pair, two shifts, another number of channels, or a scale that is not a finite number > 0.
    """
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if scale is None and shift is None and means is None and stds is None:
        return None
    if not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
        raise BadInput(f"{where}: scaling_factor: expected a finite number > 0, got {scale!r}")
    if (means is None) != (stds is None):
        raise BadInput(f"{where}: expected latents_mean and latents_std together or neither, got one of them")
    if means is None or stds is None:
        return _constant(float(shift or 0), channels), _constant(1 / scale, channels)
    if shift:
        raise BadInput(f"{where}: expected one shift of the latent, got shift_factor {shift} and latents_mean")
    mean_c, std_c = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (means, stds))
    for name, values in (("latents_mean", mean_c), ("latents_std", std_c)):
        if values.shape != (channels,):
            raise BadInput(f"{where}: {name}: expected {channels} numbers, got shape {tuple(values.shape)}")
    return mean_c, std_c / scale


def _constant(value: float, channels: int) -> Tensor:
    return torch.full((channels,), value, dtype=torch.float64, device="cpu")
