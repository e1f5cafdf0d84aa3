"""Reconstruction losses, in the units of images ([0, 1])."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

ReconKind = Literal["l1", "l2"]


def recon_loss(kind: ReconKind, xs_recon_bchw: Tensor, images_bchw: Tensor) -> Tensor:
    """Mean over all elements of the absolute ("l1") or squared ("l2") difference; a scalar.

    A bf16 reconstruction is compared with the images in the images' precision.

    Args:
        kind: "l1" or "l2".
        xs_recon_bchw: (B, 3, H, W), not clamped.
        images_bchw: (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: shapes that differ; broadcasting would give a plausible and wrong number.
    """
    if xs_recon_bchw.shape != images_bchw.shape:
        got = tuple(xs_recon_bchw.shape)
        raise ValueError(f"xs_recon: expected the images' shape {tuple(images_bchw.shape)}, got {got}")
    difference_bchw = xs_recon_bchw.to(images_bchw.dtype) - images_bchw
    return difference_bchw.abs().mean() if kind == "l1" else difference_bchw.square().mean()
