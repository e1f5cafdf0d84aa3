"""What the tests of the compile diagnostic share: small decoders, compilers with faults, and what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder

from rqvae.diagnostics.compare import BAD, Status
from rqvae.diagnostics.compilers import Compiler
from rqvae.diagnostics.rows import Row
from rqvae.diagnostics.session import Diagnosis
from rqvae.diagnostics.subjects import Subject


class Silent:
    """A listener that hears nothing."""

    def begin(self, path: str) -> None: ...

    def row(self, row: Row) -> None: ...


def small(dtype: torch.dtype = torch.float32, widths: Sequence[int] = (8, 16), layers: int = 1) -> Subject:
    """A decoder like that of Stable Diffusion XL: all its kinds of modules, in two resolutions by default."""
    torch.manual_seed(0)
    decoder = Decoder(
        in_channels=4,
        out_channels=3,
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        norm_num_groups=4,
    )
    decoder = decoder.eval().requires_grad_(False).to(dtype)
    latent = torch.randn(1, 4, 8, 8).to(dtype)
    return Subject(decoder, "decoder", latent, lambda z: (decoder(z) + 1) / 2, "a small decoder")


def diagnose(
    subject: Subject, compiler: Compiler, search: Any = "shadow", paths: Sequence[str] | None = None, **options: Any
) -> dict[str, Row]:
    """Rows by path, of all units or of some."""
    with Diagnosis(subject, compiler, **options) as diagnosis:
        rows = diagnosis.single(paths or list(diagnosis.units), {}, search, Silent())
        return {row["path"]: row for row in rows}


def flagged(rows: dict[str, Row], role: str | None = None) -> set[str]:
    """Paths that are bad, of one role or of any."""
    found = {path for path, row in rows.items() if Status(row["status"]) in BAD}
    return {path for path in found if role is None or rows[path]["role"] == role}


def backend(*faults: str, **options: Any) -> str:
    """--backend with faults."""
    arguments = {"faults": list(faults), "inner": "eager", **options}
    return json.dumps({"class_path": "rqvae.diagnostics.faults.FaultyCompiler", "init_args": arguments})


def options_of(output: Path, model: str | Path = "random-small") -> list[str]:
    """Options of a diagnosis that takes seconds."""
    return ["--output", str(output), "--device", "cpu", "--model_name", str(model), "--latent_size", "4"]


def metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of an output folder."""
    return json.loads((folder / "metrics" / "metrics.json").read_text())


def save_vae(folder: Path) -> AutoencoderKL:
    """A small `AutoencoderKL` with random weights, as diffusers writes it."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder, safe_serialization=True)
    return vae


def save_dc(folder: Path) -> AutoencoderDC:
    """A small `AutoencoderDC` with random weights: both of its kinds of blocks, linear attention of several scales."""
    torch.manual_seed(0)
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )
    vae.save_pretrained(folder, safe_serialization=True)
    return vae
