"""Frames that move: APNG, which is lossless, and GIF, which every viewer shows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rqvae.errors import BadInput
from rqvae.metrics.grids import GAP_LEVEL


def beside(left_thwc: np.ndarray, right_thwc: np.ndarray, gap: int = 2) -> np.ndarray:
    """Two films (T, H, W, 3) uint8 as one, (T, H, 2 W + gap, 3)."""
    between = np.full((*left_thwc.shape[:2], gap, 3), GAP_LEVEL, np.uint8)
    return np.concatenate((left_thwc, between, right_thwc), axis=2)


def apng_bytes(frames_thwc: np.ndarray, fps: float) -> bytes:
    """An animated PNG that repeats for ever, every pixel as it is.

    Args:
        frames_thwc: (T, H, W, 3) uint8.
        fps: frames a second.

    Raises:
        BadInput: another shape or type, or no frame.
    """
    return _encoded(frames_thwc, fps, 1, "PNG")


def gif_bytes(frames_thwc: np.ndarray, fps: float, scale: int = 1) -> bytes:
    """An animated GIF that repeats for ever; 256 colours a frame.

    Args:
        frames_thwc: (T, H, W, 3) uint8.
        fps: frames a second; a GIF counts in hundredths of a second.
        scale: each pixel becomes a square of this side.

    Raises:
        BadInput: see `apng_bytes`.
    """
    return _encoded(frames_thwc, fps, scale, "GIF")


def _encoded(frames: np.ndarray, fps: float, scale: int, kind: str) -> bytes:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise BadInput(f"frames: expected uint8 (T, H, W, 3) with T >= 1, got {frames.dtype} {frames.shape}")
    first, others = next(iter(_Enlarged(frames, scale))), _Enlarged(frames[1:], scale)
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others, duration=1000 / fps, loop=0)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Enlarged:
    """Pictures, enlarged one at a time as they are written; those of a PNG are gone through twice."""

    frames: np.ndarray
    scale: int

    def __iter__(self) -> Iterator[Image.Image]:
        for frame in self.frames:
            yield Image.fromarray(frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1))
