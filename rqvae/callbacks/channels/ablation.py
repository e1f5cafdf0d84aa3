"""What a channel is worth: the network with that channel replaced by its mean.

By its mean and not by zero: a constant channel carries no information, and zeroing it shifts what comes after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rqvae.callbacks.channels.wiring import Wire
from rqvae.errors import BadInput


@contextlib.contextmanager
def replaced(wire: Wire, channel: int, mean: float | Tensor) -> Iterator[None]:
    """Within this context the layer behind a tracked one sees `mean` in place of what the channel gives.

    Args:
        wire: of the tracked layer.
        channel: of it.
        mean: of the channel after the activation.

    Raises:
        BadInput: no layer takes the channel in alone, as behind a sum.
    """
    if wire.target is None:
        raise BadInput("ablation: expected a layer whose output one other layer takes in, got one without")
    axis = -1 if isinstance(wire.target, nn.Linear) else 1

    def replace(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
        x = arguments[0]
        shape = [1] * x.ndim
        shape[axis] = -1
        chosen = (torch.arange(x.shape[axis], device=x.device) == channel).reshape(shape)
        return (torch.where(chosen, torch.as_tensor(mean, dtype=x.dtype, device=x.device), x), *arguments[1:])

    handle = wire.target.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def psnr_of(recon_bchw: Tensor, images_bchw: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE), images in [0, 1]; reads the device."""
    mse_b = (recon_bchw.clamp(0, 1) - images_bchw).double().square().flatten(1).mean(1)
    return float((-10 * mse_b.clamp(min=1e-10).log10()).mean())
