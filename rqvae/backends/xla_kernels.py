"""Operations that torch_xla 2.9 runs outside the step's program, compiles anew or refuses, in forms it accepts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def _upsample_nearest2d_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scales_h: float | None = None,  # noqa: ARG001  (the sizes say it)
    scales_w: float | None = None,  # noqa: ARG001
) -> Tensor:
    """Sum over each pixel's copies, (B, C, H, W) -> (B, C, h, w), for whole factors.

    torch_xla lowers it for TPUs alone; elsewhere it computes it on the host, in the midst of the step.
    """
    batch, channels, height, width = input_size
    factors = output_size[0] // height, output_size[1] // width
    if (height * factors[0], width * factors[1]) != tuple(output_size):
        raise NotImplementedError(f"upsampling from {(height, width)} to {tuple(output_size)}: expected whole factors")
    return grad.reshape(batch, channels, height, factors[0], width, factors[1]).sum((3, 5))


def _pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, C factor^2, H / factor, W / factor).

    torch_xla's own, and that of the inverse, refuse to work with XLA_DISABLE_FUNCTIONALIZATION=1.
    """
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // factor, factor, width // factor, factor)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // factor, width // factor)


def _pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """The inverse of `_pixel_unshuffle`."""
    batch, _, height, width = x.shape
    cut = x.reshape(batch, -1, factor, factor, height, width)
    return cut.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * factor, width * factor)


def data_of(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar that is data of the program whatever its value is.

    Of a tensor without axes, torch_xla compiles the values 0 and 1 into the program, and shares the memory of any other
    with each number in the code that happens to be equal: the program then has one argument less.
    """
    return torch.tensor([value], dtype=dtype).to(device).reshape(())


_WEIGHTS: dict[tuple[torch.device, torch.dtype], tuple[float, Tensor]] = {}


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """torch's own formula, with both of its branches in the program.

    The library chooses the branch on the host, so that the step is compiled a second time when the weight of a running
    average passes 0.5. The weight is data, copied once for all the tensors that are averaged with it.
    """
    key = start.device, start.dtype
    if _WEIGHTS.get(key, (None,))[0] != weight:
        _WEIGHTS[key] = weight, data_of(weight, start.dtype, start.device)
    share, difference = _WEIGHTS[key][1], end - start
    return torch.where(share < 0.5, start + share * difference, end - difference * (1 - share))


def register() -> torch.library.Library:
    """Use them on XLA's devices, for as long as the library that is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl("upsample_nearest2d_backward", _upsample_nearest2d_backward, "XLA")
        library.impl("pixel_unshuffle", _pixel_unshuffle, "XLA")
        library.impl("pixel_shuffle", _pixel_shuffle, "XLA")
        library.impl("lerp.Scalar", _lerp, "XLA")
    return library
