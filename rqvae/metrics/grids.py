"""Many images in one: contact sheets for training pictures and reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rqvae.errors import BadInput

GAP_LEVEL = 255


def image_grid(images_nchw_u8: np.ndarray, columns: int, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Images side by side, row after row; places left over and gaps are white.

    Args:
        images_nchw_u8: (N, 3, H, W) uint8, N >= 1.
        columns: images in a row; fewer images than that make a narrower sheet.
        gap: pixels between images.
        scale: each pixel becomes a square of this side, so that small frames can be seen.

    Returns:
        (H', W', 3) uint8.

    Raises:
        BadInput: another shape or type, or a number out of its range.
    """
    _check_images("images", images_nchw_u8)
    if columns < 1 or scale < 1 or gap < 0:
        raise BadInput(f"image_grid: expected columns >= 1, scale >= 1 and gap >= 0, got {columns}, {scale} and {gap}")
    images = images_nchw_u8.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), GAP_LEVEL, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (height + gap), k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _check_images(name: str, images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images) or images.dtype != np.uint8:
        raise BadInput(f"{name}: expected uint8 (N, 3, H, W) with N >= 1, got {images.dtype} {images.shape}")


def grouped_grid(groups_nm: Sequence[np.ndarray], gap: int = 2, between: int = 8, scale: int = 1) -> np.ndarray:
    """A row a sample; in it the frames of each group, the groups set apart: context | target | prediction.

    Args:
        groups_nm: for each group (N, M, H, W, 3) uint8 of equal N, H and W.
        gap: pixels between frames and between rows.
        between: pixels between groups.
        scale: each pixel becomes a square of this side.

    Returns:
        (H', W', 3) uint8; gaps are white.

    Raises:
        BadInput: no group, or groups that do not fit.
    """
    shapes = [(group.shape[0], *group.shape[2:]) if group.ndim == 5 else group.shape for group in groups_nm]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 4 or any(g.dtype != np.uint8 for g in groups_nm):
        raise BadInput(f"grouped_grid: expected groups (N, M, H, W, 3) uint8 of equal N, H, W, got {shapes}")
    count, height, width, _ = shapes[0]
    lefts, left = [], 0
    for group in groups_nm:
        lefts.append([left + m * (scale * width + gap) for m in range(group.shape[1])])
        left = lefts[-1][-1] + scale * width + between
    sheet = np.full((count * (scale * height + gap) - gap, left - between, 3), GAP_LEVEL, np.uint8)
    for group, columns in zip(groups_nm, lefts, strict=True):
        large = group.repeat(scale, axis=2).repeat(scale, axis=3)
        for n in range(count):
            top = n * (scale * height + gap)
            for m, at in enumerate(columns):
                sheet[top : top + scale * height, at : at + scale * width] = large[n, m]
    return sheet
