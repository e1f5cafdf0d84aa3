"""Scores of predicted frames, on all pixels and on those that move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

MOVES = 0.1
"""A pixel moves where a colour differs from the frame before by more than this share of the range."""


@dataclass
class PixelErrors:
    """Squared errors in [0, 1] units, pooled over frames; on all pixels and on the moving ones.

    Pooled, not a mean of PSNRs: a frame in which nothing moves has no moving pixels, and an exact one has no PSNR.
    """

    squared: float = 0.0
    count: int = 0
    squared_moving: float = 0.0
    count_moving: int = 0

    def update(self, predicted: Frames, target: Frames, before: Frames) -> None:
        """Add frames (..., H, W, 3) uint8: the prediction, the true frame, and the true one before it."""
        error = np.square((predicted.astype(np.float64) - target) / 255)
        moving = np.abs(target.astype(np.int64) - before).max(-1) > MOVES * 255
        self.squared += float(error.sum())
        self.count += error.size
        self.squared_moving += float(error[moving].sum())
        self.count_moving += int(moving.sum()) * 3

    @property
    def psnr(self) -> float:
        """On all pixels, dB."""
        return _decibel(self.squared, self.count)

    @property
    def psnr_moving(self) -> float:
        """On moving pixels, dB; NaN where nothing moved."""
        return _decibel(self.squared_moving, self.count_moving)


def _decibel(squared: float, count: int) -> float:
    if count == 0:
        return math.nan
    return math.inf if squared == 0 else -10 * math.log10(squared / count)
