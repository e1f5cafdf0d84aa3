"""Whether an image shows nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

STD_THRESHOLD = 1e-4


def as_image_tensor(image: Any) -> Tensor:
    """(B, C, H, W) float32 of a PIL image (scaled to [0, 1]) or of a tensor (C, H, W) or (B, C, H, W), as it is.

    Raises:
        ValueError: another type, an empty tensor, another number of dimensions, or channels other than 1 or 3.
    """
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"), dtype=np.float32) / 255
        image = torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"image: expected a tensor or a PIL image, got {type(image).__name__}")
    if image.numel() == 0:
        raise ValueError(f"image: expected pixels, got an empty tensor of shape {tuple(image.shape)}")
    if image.ndim not in (3, 4):
        raise ValueError(f"image: expected 3 or 4 dimensions, got {image.ndim}")
    if image.shape[-3] not in (1, 3):
        raise ValueError(f"image: expected 1 or 3 channels, got {image.shape[-3]}")
    return image.detach().float().reshape(-1, *image.shape[-3:])


def is_blank(
    image: Any,
    std_threshold: float = STD_THRESHOLD,
    constant_value: float | None = None,
    outlier_tolerance: float = 0.0,
) -> bool:
    """Whether an image, or any of a batch, is blank: constant up to a threshold, or black.

    Args:
        image: PIL image, or tensor (C, H, W) or (B, C, H, W) with 1 or 3 channels in [0, 1].
        std_threshold: a standard deviation over all values below this is blank.
        constant_value: also blank where the values are this one, up to the threshold.
        outlier_tolerance: share in [0, 1] of values that may differ by more, from `constant_value` where it is given,
            else from the median: a few dead pixels do not make a picture.

    Raises:
        ValueError: no image, see `as_image_tensor`.
    """
    return any(
        _one_is_blank(values, std_threshold, constant_value, outlier_tolerance)
        for values in as_image_tensor(image).flatten(1)
    )


def _one_is_blank(values: Tensor, threshold: float, constant: float | None, tolerance: float) -> bool:
    if float(values.std(correction=0)) < threshold or float(values.mean()) == 0.0:
        return True
    if constant is None and tolerance == 0:
        return False
    centre = values.median() if constant is None else torch.tensor(constant)
    outliers = ((values - centre).abs() > threshold) | ~values.isfinite()
    return float(outliers.float().mean()) <= tolerance
