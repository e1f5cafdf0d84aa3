"""Scores of predicted frames beside the true ones: PSNR on all and on moving pixels, SSIM, LPIPS where it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rqvae.metrics.moving import Frames, PixelErrors
from rqvae.metrics.perceptual import LPIPSScore
from rqvae.metrics.reconstruction import ssim


@dataclass
class FrameScores:
    """Sums over frames.

    Args:
        lpips: a loaded network; None leaves that score out.
    """

    lpips: LPIPSScore | None = None
    pixels: PixelErrors = field(default_factory=PixelErrors)
    _ssim: float = 0.0
    _lpips: float = 0.0
    _count: int = 0

    def update(self, predicted: Frames, target: Frames, before: Frames) -> None:
        """Add frames (N, H, W, 3) uint8: the prediction, the true frame, and the true one before it."""
        self.pixels.update(predicted, target, before)
        pair = _floats(predicted), _floats(target)
        self._ssim += float(ssim(*pair).sum())
        if self.lpips is not None:
            self._lpips += float(self.lpips(*pair).sum())
        self._count += len(target)

    def result(self, name: str = "") -> dict[str, float]:
        """`psnr`, `psnr_moving` (dB), `ssim`, and `lpips` where there is a network; NaN without a frame.

        Args:
            name: of a baseline: its scores are then NAME (the PSNR), NAME_moving, NAME_ssim and NAME_lpips.
        """
        psnr, before = (name, f"{name}_") if name else ("psnr", "")
        count = self._count or math.nan
        moving = f"{psnr}_moving"
        row = {psnr: self.pixels.psnr, moving: self.pixels.psnr_moving, f"{before}ssim": self._ssim / count}
        return row | ({f"{before}lpips": self._lpips / count} if self.lpips is not None else {})


def _floats(frames: Frames) -> Tensor:
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).double() / 255
