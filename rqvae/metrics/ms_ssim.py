"""Multi-scale SSIM of Wang, Simoncelli and Bovik 2003, with the windows and constants of `ssim`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rqvae.errors import BadInput
from rqvae.metrics.reconstruction import WINDOW, ssim_and_contrast

KEY = "ms_ssim_wang_rgb_u8"
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
LEAST_SIDE = WINDOW * 2 ** (len(BETAS) - 1)


def ms_ssim(recon_bchw: Tensor, images_bchw: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Contrast and structure at five scales and luminance at the coarsest (eq. 7), per channel, averaged over channels.

    Between scales 2 x 2 pixels are averaged; a last odd row or column is left out. A negative factor counts as 0.

    Args:
        recon_bchw: (B, C, H, W) floats in [0, 1], sides of at least 176 pixels.
        images_bchw: same shape.
        dtype: to compute in.

    Returns:
        (B,) in [0, 1], of `dtype`.

    Raises:
        BadInput: shapes that differ, are not (B, C, H, W), or are too small for the window at the coarsest scale.
    """
    shape = tuple(images_bchw.shape)
    if tuple(recon_bchw.shape) != shape or len(shape) != 4 or min(shape[2:]) < LEAST_SIDE:
        raise BadInput(
            f"ms_ssim: expected two tensors of one shape (B, C, H, W) with sides >= {LEAST_SIDE}, "
            f"got {tuple(recon_bchw.shape)} and {shape}"
        )
    x, y = recon_bchw.to(dtype), images_bchw.to(dtype)
    product_bc = torch.ones(shape[:2], dtype=dtype, device=x.device)
    for beta in BETAS[:-1]:
        product_bc = product_bc * ssim_and_contrast(x, y)[1].clamp(min=0) ** beta
        x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
    return (product_bc * ssim_and_contrast(x, y)[0].clamp(min=0) ** BETAS[-1]).mean(1)
