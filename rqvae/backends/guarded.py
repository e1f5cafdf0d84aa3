"""An optimizer step that the device itself leaves out where the gradients are not finite, or unusually large."""

from __future__ import annotations

import torch
from torch import Tensor

from rqvae.errors import BadInput


def step_if_at_most(optimizer: torch.optim.Optimizer, norm: Tensor, at_most: Tensor) -> None:
    """Update the weights where `norm` is finite and at most `at_most`.

    Else weights, moments and step counters stay. Nothing is read.

    `found_inf` is what fused optimizers take from a gradient scaler: their kernel returns at once where it is 1.

    Args:
        optimizer: a fused one.
        norm: scalar, of the gradients of all ranks, so that all decide alike.
        at_most: scalar or (1,), the same on all ranks; inf leaves out what is not finite and nothing else.

    Raises:
        BadInput: an optimizer that cannot.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise BadInput(
            f"train.skip_nonfinite: expected an optimizer that takes found_inf (fused), got {type(optimizer).__name__}"
        )
    keep = norm.isfinite() & (norm <= at_most.reshape(()))
    optimizer.found_inf = (~keep).to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
