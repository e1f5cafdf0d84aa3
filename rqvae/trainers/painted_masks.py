"""Masks that a user gives: PNGs of class numbers, or painted in the colours of the pictures that training writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, MaskCondition
from rqvae.img_datasets.mask_files import MASK_ENDING, read_mask
from rqvae.mask_colours import palette


def read_painted(path: Path, num_classes: int) -> Tensor:
    """(H, W) int64 in [0, K] of a PNG of class numbers, or of one in the colours of `rqvae.mask_colours`.

    In a PNG with a palette, which painting programs write and so do data sets of segmentation, the numbers are classes
    unless what they show is painted in those colours.

    Raises:
        BadInput: a file that is neither; the first colour that is none of a class is named with its place.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("RGB", "RGBA", "P"):
                return read_mask(path, num_classes)
            mode, pixels = file.mode, np.array(file.convert("RGB")).astype(np.int64)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{path}: expected a readable mask, got {type(error).__name__}") from error
    code = np.array([1 << 16, 1 << 8, 1])
    colours, painted = palette(num_classes).astype(np.int64) @ code, pixels @ code
    if mode == "P" and not np.isin(painted, colours).all():
        return read_mask(path, num_classes)
    mask = np.full(painted.shape, -1, dtype=np.int64)
    for number, colour in enumerate(colours):
        mask[painted == colour] = number
    if (mask < 0).any():
        row, column = np.argwhere(mask < 0)[0].tolist()
        named = ", ".join(f"{k} #{colour:06x}" for k, colour in enumerate(colours.tolist()))
        raise BadInput(
            f"{path}: expected colours of classes ({named}), got #{int(painted[row, column]):06x} at row {row}, "
            f"column {column}"
        )
    return torch.from_numpy(mask)


def masks_in(place: Path) -> list[Path]:
    """The masks of a folder in the order of their names: NAME_mask.png where there are any, else all PNGs; or one file.

    Raises:
        BadInput: none there.
    """
    if place.is_file():
        return [place]
    files = sorted(place.glob("*.png"))
    files = [file for file in files if file.name.endswith(MASK_ENDING)] or files
    if not files:
        raise BadInput(f"--masks {place}: expected a PNG or a folder of them, got none")
    return files


def masks_in_turn(files: list[Path], spec: DataSpec, first: int, count: int) -> MaskCondition:
    """The masks of images `first` to `first + count`, the files in turn.

    Raises:
        BadInput: a mask of another size than the model's images.
    """
    wanted, masks = tuple(spec.image_shape[1:]), []
    for number in range(first, first + count):
        file = files[number % len(files)]
        mask = read_painted(file, spec.num_mask_classes)
        if tuple(mask.shape) != wanted:
            raise BadInput(
                f"{file}: expected a mask of {wanted[0]} x {wanted[1]}, got {mask.shape[0]} x {mask.shape[1]} "
                "(python -m rqvae canvas takes any size)"
            )
        masks.append(mask)
    return MaskCondition(torch.stack(masks), spec.num_mask_classes)
