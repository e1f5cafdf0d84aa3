"""An optimizer step that the device itself leaves out where the gradients are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from rqvae.errors import BadInput


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Update the weights where `norm` is finite; else weights, moments and step counters stay. Nothing is read.

    `found_inf` is what fused optimizers take from a gradient scaler: their kernel returns at once where it is 1.

    Args:
        optimizer: a fused one.
        norm: scalar, of the gradients of all ranks, so that all decide alike.

    Raises:
        BadInput: an optimizer that cannot.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise BadInput(
            f"train.skip_nonfinite: expected an optimizer that takes found_inf (fused), got {type(optimizer).__name__}"
        )
    optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
