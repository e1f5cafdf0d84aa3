"""Contact sheets as PNG files and PNG bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rqvae.metrics.grids import image_grid


def png_bytes(image_hwc_u8: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_hwc_u8).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def save_grid(images_nchw_u8: Any, path: Path, columns: int, scale: int = 1, gap: int = 2) -> Path:
    """Write images as one PNG sheet; missing folders are made.

    Args:
        images_nchw_u8: (N, 3, H, W) uint8, an array or a tensor of the host.
        path: of the PNG.
        columns: images in a row.
        scale: side of the square that a pixel becomes.
        gap: pixels between images.

    Returns:
        `path`.

    Raises:
        BadInput: see `rqvae.metrics.grids.image_grid`.
    """
    sheet = image_grid(np.asarray(images_nchw_u8), columns, gap, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(sheet))
    return path
