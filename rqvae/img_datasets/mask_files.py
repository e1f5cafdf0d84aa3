"""Folders of images and masks: what is there, which classes each mask holds, kept in an index beside the data.

Layout (that of DiffInfinite's data): `NAME.jpg` with `NAME_mask.png`, whose pixels are class numbers, in one folder;
images without masks in another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.files import file_sha256, read_json, write_whole

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_ENDING = "_mask.png"
INDEX_NAME = "mask_index.json"


@dataclass(frozen=True)
class MaskIndex:
    """What a folder holds.

    Args:
        names: of the labelled images, sorted, relative to the folder.
        pixels_nk: (N, K) int64, pixels of each class in each mask.
        twins: of each image whose bytes an earlier one has too, that one's name.
        key: hash of the files' names, sizes and times, by which a kept index is recognised.
    """

    names: tuple[str, ...]
    pixels_nk: Tensor
    twins: dict[str, str]
    key: str


def image_names(folder: Path) -> list[str]:
    """Names of the images in a folder, masks left out, sorted.

    Raises:
        BadInput: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: expected a folder of images, got no such folder")
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES))
    images = [name for name in names if not name.endswith(MASK_ENDING)]
    if not images:
        raise BadInput(f"{folder}: expected images ({' '.join(IMAGE_SUFFIXES)}), got none")
    return images


def mask_of(image: Path) -> Path:
    """Where the mask of an image is."""
    return image.with_name(image.stem + MASK_ENDING)


def read_mask(path: Path, num_classes: int) -> Tensor:
    """Class numbers (H, W) int64 in [0, num_classes).

    Raises:
        BadInput: no readable image; one with colours, transparency or more than 8 bits; a number out of range.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1"):
                kind = "more than 8 bits" if file.mode.startswith(("I", "F")) else "colours"
                raise BadInput(f"{path}: expected one channel of 8-bit class numbers, got {kind} (mode {file.mode})")
            mask = np.array(file).astype(np.int64)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: expected a readable mask, got {type(error).__name__}: {reason}") from error
    if mask.size and mask.max() >= num_classes:
        raise BadInput(f"{path}: expected class numbers below {num_classes} (num_classes), got {int(mask.max())}")
    return torch.from_numpy(mask)


def read_index(folder: Path, num_classes: int, index: Path) -> MaskIndex:
    """The index of a folder: the kept one where it is of the present files, else a new one, which is then kept.

    Args:
        folder: of images and masks.
        num_classes: K.
        index: the file it is kept in.

    Raises:
        BadInput: an image without a mask or a mask without an image, a mask that `read_mask` refuses or of another size
            than its image, or an index that is none or cannot be written.
    """
    names = image_names(folder)
    key = _key(folder, names, num_classes)
    if index.exists():
        kept = read_json(index, "remove it")
        if not {"key", "pixels"} <= kept.keys():
            raise BadInput(f"{index}: expected an index of masks (key and pixels), got something else; remove it")
        if kept["key"] == key and "twins" in kept:
            return MaskIndex(tuple(names), torch.tensor(kept["pixels"], dtype=torch.int64), kept["twins"], key)
    _log.info("%s: counting the classes of %d masks, once", folder, len(names))
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda name: _count(folder / name, num_classes), names))
    twins = _twins(folder, names)
    try:
        write_whole(index, json.dumps({"key": key, "pixels": pixels, "twins": twins}))
    except OSError as error:
        raise BadInput(f"index: expected a place that can be written, got {index}: {error.strerror}") from error
    return MaskIndex(tuple(names), torch.tensor(pixels, dtype=torch.int64), twins, key)


def _twins(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Of each image whose bytes an earlier one has too, that one's name; only files of equal size are read."""
    by_size: dict[int, list[str]] = {}
    for name in names:
        by_size.setdefault((folder / name).stat().st_size, []).append(name)
    twins: dict[str, str] = {}
    for alike in (group for group in by_size.values() if len(group) > 1):
        first: dict[str, str] = {}
        for name in alike:
            earlier = first.setdefault(file_sha256(folder / name), name)
            if earlier != name:
                twins[name] = earlier
    return twins


def check_apart(labelled: Path, names: Iterable[str], unlabelled: Path, others: Iterable[str]) -> None:
    """That no image is in both folders, by name or by content.

    Contents are hashed only where two files have the same size.

    Raises:
        BadInput: one that is.
    """
    stems = {Path(name).stem: name for name in names}
    by_size: dict[int, list[str]] = {}
    for name in stems.values():
        by_size.setdefault((labelled / name).stat().st_size, []).append(name)
    for other in others:
        file = unlabelled / other
        if twin := stems.get(file.stem):
            raise BadInput(f"{file}: expected an image that is not in {labelled} too, got {twin} of the same name")
        for name in by_size.get(file.stat().st_size, []):
            if file_sha256(labelled / name) == file_sha256(file):
                raise BadInput(f"{file}: expected an image that is not in {labelled} too, got the content of {name}")


def _key(folder: Path, names: Sequence[str], num_classes: int) -> str:
    """Hash of what the index was made from; BadInput where an image or a mask is without the other."""
    stems = {Path(name).stem for name in names}
    for mask in sorted(name for name in os.listdir(folder) if name.endswith(MASK_ENDING)):
        if mask.removesuffix(MASK_ENDING) not in stems:
            raise BadInput(f"{folder / mask}: expected the image of this mask beside it, got none")
    rows = [f"classes {num_classes}"]
    for name in names:
        for path in (folder / name, mask_of(folder / name)):
            if not path.exists():
                raise BadInput(f"{folder / name}: expected a mask {path.name} beside it, got none")
            state = path.stat()
            rows.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _count(image: Path, num_classes: int) -> list[int]:
    """Pixels of each class in an image's mask."""
    path = mask_of(image)
    mask = read_mask(path, num_classes)
    try:
        with Image.open(image) as file:
            size = (file.height, file.width)
    except (OSError, Image.DecompressionBombError) as error:
        raise BadInput(f"{image}: expected a readable image, got {type(error).__name__}: {error}") from error
    if tuple(mask.shape) != size:
        raise BadInput(f"{path}: expected {size[0]} x {size[1]} as its image, got {mask.shape[0]} x {mask.shape[1]}")
    return torch.bincount(mask.flatten(), minlength=num_classes).tolist()
