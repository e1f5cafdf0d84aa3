"""`KLVAE` as a folder of huggingface/diffusers, and back. The same layers under other names: outputs are identical."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.models.stage1.diffusers_source import CONFIG, load_model
from rqvae.models.stage1.kl_vae import KLVAE

DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True)
class _Layout:
    """The sizes that both configurations share.

    Args:
        widths: channels of each resolution, highest resolution first.
        blocks: residual blocks per resolution of the encoder.
        groups: groups of every norm.
        attention: attention at the lowest resolution.
        latent_channels: C of the latent.
    """

    widths: tuple[int, ...]
    blocks: int
    groups: int
    attention: bool
    latent_channels: int


def to_diffusers(
    model: KLVAE,
    folder: str | Path,
    *,
    mean_c: Tensor | None = None,
    std_c: Tensor | None = None,
    sample_size: int | None = None,
) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors for `AutoencoderKL.from_pretrained`.

    Dropout and the loss's settings have no place in the format. Without statistics `scaling_factor` is null, for
    diffusers would fill in Stable Diffusion's 0.18215: a pipeline then fails where it would have scaled wrongly.

    Args:
        model: the autoencoder; its weights keep their precision.
        folder: new or empty.
        mean_c: (C,) mean of the latents, as `ScaleShift` has it; becomes `latents_mean`.
        std_c: (C,) std of the latents; becomes `latents_std`, with a `scaling_factor` of 1.
        sample_size: side of the images it was trained on, from which diffusers takes the size of tiles.

    Raises:
        BadInput: a folder with files in it, a subclass of KLVAE (its own layers have no name in diffusers), one
            statistic without the other or of another number of channels.
    """
    if type(model) is not KLVAE:
        raise BadInput(f"export: expected a KLVAE, the only model with a form in diffusers, got {type(model).__name__}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: expected a new or empty folder to export to, got one with files")
    layout = _layout_of(model)
    scale = _scale_entries(mean_c, std_c, layout.latent_channels)
    first = model.quant_conv.weight
    kind: Any = AutoencoderKL
    sizes = {} if sample_size is None else {"sample_size": sample_size}
    exported = kind(**_their_config(layout), **scale, **sizes).to(dtype=first.dtype)
    names = _names(layout)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        module, kind = key.rsplit(".", 1)
        theirs = names[module]
        state |= {f"{name}.{kind}": part for name, part in zip(theirs, value.chunk(len(theirs)), strict=True)}
    exported.load_state_dict(state)
    exported.save_pretrained(folder, safe_serialization=True)


def from_diffusers(folder: str | Path) -> KLVAE:
    """A `KLVAE` in float32 and eval mode with the layers and weights of a folder's `AutoencoderKL`.

    The folder's latent scale is not part of a KLVAE; `rqvae.models.stage1.diffusers_vae.AutoencoderKLStage1` has it.

    Raises:
        BadInput: not an `AutoencoderKL` (see `load_model`), or one with layers that KLVAE does not have.
    """
    folder = Path(folder)
    source = load_model(AutoencoderKL, folder)
    layout = _layout_of_config(dict(source.config), folder / CONFIG)
    model = KLVAE(**_our_arguments(layout))
    names, theirs, state = _names(layout), source.state_dict(), {}
    for key in model.state_dict():
        module, kind = key.rsplit(".", 1)
        state[key] = torch.cat([theirs[f"{name}.{kind}"] for name in names[module]])
    model.load_state_dict(state)
    return model.eval()


def klvae_arguments(folder: str | Path) -> dict[str, Any]:
    """The arguments of the `KLVAE` that `from_diffusers` makes of a folder."""
    source = load_model(AutoencoderKL, Path(folder))
    return _our_arguments(_layout_of_config(dict(source.config), Path(folder) / CONFIG))


def _our_arguments(layout: _Layout) -> dict[str, Any]:
    width = math.gcd(*layout.widths)
    return {
        "latent_channels": layout.latent_channels,
        "width": width,
        "multipliers": [w // width for w in layout.widths],
        "blocks": layout.blocks,
        "norm_groups": layout.groups,
        "attention": layout.attention,
    }


def _layout_of(model: KLVAE) -> _Layout:
    stages: list[Any] = list(model.encoder.stages)
    return _Layout(
        widths=tuple(stage[0].conv1.out_channels for stage in stages),
        # The last stage has blocks alone, the others a Downsample behind them.
        blocks=len(stages[-1]),
        groups=model.encoder.norm_out.num_groups,
        attention=len(model.encoder.mid) == 3,
        latent_channels=model.latent_channels,
    )


def _their_config(layout: _Layout) -> dict[str, Any]:
    levels = len(layout.widths)
    return {
        "down_block_types": (DOWN_BLOCK,) * levels,
        "up_block_types": (UP_BLOCK,) * levels,
        "block_out_channels": layout.widths,
        "layers_per_block": layout.blocks,
        "norm_num_groups": layout.groups,
        "latent_channels": layout.latent_channels,
        "mid_block_add_attention": layout.attention,
    }


def _layout_of_config(config: dict[str, Any], where: Path) -> _Layout:
    """The sizes in a config.json with diffusers' defaults filled in.

    Raises:
        BadInput: a value that asks for layers KLVAE does not have.
    """
    widths = tuple(config["block_out_channels"])
    expected = {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": [DOWN_BLOCK] * len(widths),
        "up_block_types": [UP_BLOCK] * len(widths),
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    for key, value in expected.items():
        got = list(config[key]) if isinstance(config[key], list | tuple) else config[key]
        if got != value:
            raise BadInput(
                f"{where}: {key}: expected {value}, the layers of KLVAE, got {got}; AutoencoderKLStage1 takes it as is"
            )
    return _Layout(
        widths,
        config["layers_per_block"],
        config["norm_num_groups"],
        config["mid_block_add_attention"],
        config["latent_channels"],
    )


def _scale_entries(mean_c: Tensor | None, std_c: Tensor | None, channels: int) -> dict[str, Any]:
    """The entries of config.json that say how latents are normalised."""
    if mean_c is None and std_c is None:
        return {"scaling_factor": None}
    for name, values in (("mean_c", mean_c), ("std_c", std_c)):
        got = None if values is None else tuple(values.shape)
        if got != (channels,):
            raise BadInput(f"export: {name}: expected a tensor of shape ({channels},), got {got}")
    assert mean_c is not None
    assert std_c is not None
    return {"scaling_factor": 1.0, "latents_mean": mean_c.tolist(), "latents_std": std_c.tolist()}


def _names(layout: _Layout) -> dict[str, list[str]]:
    """Our layers' names and diffusers'; our one layer for query, key and value is three there."""
    names = {"quant_conv": ["quant_conv"], "post_quant_conv": ["post_quant_conv"]}
    names |= _side_names("encoder", "down_blocks", "downsamplers", layout, layout.blocks)
    return names | _side_names("decoder", "up_blocks", "upsamplers", layout, layout.blocks + 1)


def _side_names(side: str, stages: str, resampler: str, layout: _Layout, blocks: int) -> dict[str, list[str]]:
    names = {"conv_in": ["conv_in"], "norm_out": ["conv_norm_out"], "conv_out": ["conv_out"]}
    names |= _block_names("mid.0", "mid_block.resnets.0")
    names |= _block_names(f"mid.{1 + layout.attention}", "mid_block.resnets.1")
    if layout.attention:
        place = "mid_block.attentions.0"
        names |= {"mid.1.norm": [f"{place}.group_norm"], "mid.1.out": [f"{place}.to_out.0"]}
        names["mid.1.qkv"] = [f"{place}.to_{letter}" for letter in "qkv"]
    for i in range(len(layout.widths)):
        for j in range(blocks):
            names |= _block_names(f"stages.{i}.{j}", f"{stages}.{i}.resnets.{j}")
        names[f"stages.{i}.{blocks}.conv"] = [f"{stages}.{i}.{resampler}.0.conv"]
    return {f"{side}.{ours}": [f"{side}.{name}" for name in theirs] for ours, theirs in names.items()}


def _block_names(ours: str, theirs: str) -> dict[str, list[str]]:
    same = {f"{ours}.{layer}": [f"{theirs}.{layer}"] for layer in ("norm1", "conv1", "norm2", "conv2")}
    return same | {f"{ours}.shortcut": [f"{theirs}.conv_shortcut"]}
