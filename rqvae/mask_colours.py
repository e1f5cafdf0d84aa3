"""Masks as pictures: one colour a class."""

from __future__ import annotations

import colorsys

import numpy as np

from rqvae.errors import BadInput

FIRST_COLOURS = ((255, 255, 255), (255, 165, 0), (0, 255, 255), (255, 0, 0), (0, 128, 0))
"""White, orange, cyan, red, green: the colours of classes 0 to 4 in the pictures of DiffInfinite's descendants."""

NULL_COLOUR = (128, 128, 128)
GOLDEN_ANGLE = 0.381966


def palette(num_classes: int) -> np.ndarray:
    """(K + 1, 3) uint8: colours of the classes, and grey for what has no label (number K)."""
    more = range(len(FIRST_COLOURS), num_classes)
    hues = [colorsys.hsv_to_rgb((0.7 + k * GOLDEN_ANGLE) % 1, 0.8, 0.8 if k % 2 else 0.5) for k in more]
    colours = [*FIRST_COLOURS[:num_classes], *(tuple(round(255 * part) for part in hue) for hue in hues), NULL_COLOUR]
    return np.array(colours, dtype=np.uint8)


def coloured(mask_bhw: np.ndarray, num_classes: int) -> np.ndarray:
    """Masks (B, H, W) of class numbers, `num_classes` where there is none, as pictures (B, 3, H, W) uint8.

    Raises:
        BadInput: a number outside [0, num_classes].
    """
    if mask_bhw.size and not 0 <= mask_bhw.min() <= mask_bhw.max() <= num_classes:
        raise BadInput(f"mask: expected numbers in [0, {num_classes}], got {mask_bhw.min()} to {mask_bhw.max()}")
    return palette(num_classes)[mask_bhw].transpose(0, 3, 1, 2)
