"""A folder of image files, with or without a subfolder per class."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec, LabeledImageData, LabeledImageDataset, Split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_log = logging.getLogger(__name__)


class ImageFolder(LabeledImageDataset):
    """`root/SPLIT_FOLDER/[CLASS/]IMAGE`, in sorted order.

    Images are given as they are stored, in any size; a transform crops them. With classes, the class folders sorted by
    name have the labels 0, 1, ...; without, images are searched at any depth. Symbolic links are followed.

    Args:
        split: train, val or test.
        root: the folder that holds the splits' folders.
        size: side of the square that the transform crops, in pixels.
        num_classes: how many class folders there are; 0 for images without classes.
        split_folders: folder of each split, relative to `root`; by default train, val and, because ImageNet's test
            images have no labels, val again for test.
        on_bad_image: `error` stops at an image that cannot be read; `skip` warns, counts it and gives the next readable
            one, with its label.

    Raises:
        BadInput: a size below 1, a negative number of classes, or `split_folders` without this split.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str,
        size: int,
        num_classes: int = 0,
        split_folders: dict[str, str] | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        folders = {"train": "train", "val": "val", "test": "val"} if split_folders is None else split_folders
        if split not in folders:
            raise BadInput(f"split_folders: expected a folder for {split}, got {sorted(folders)}")
        if size < 1 or num_classes < 0:
            raise BadInput(f"size, num_classes: expected at least 1 and at least 0, got {size}, {num_classes}")
        self.split, self.size, self.num_classes, self.on_bad_image = split, size, num_classes, on_bad_image
        self.folder = Path(root) / folders[split]
        self._paths: list[str] = []
        self._labels = torch.empty(0, dtype=torch.int64)
        self._bad = torch.empty(0, dtype=torch.bool)

    @property
    def spec(self) -> DataSpec:
        """(3, size, size) after the transform; the names of the classes are on the disk and so not known here."""
        return DataSpec((3, self.size, self.size), num_classes=self.num_classes)

    def open(self) -> None:
        """List the images.

        Raises:
            BadInput: a missing folder, one without images, a class folder without images, or another number of class
                folders than `num_classes`.
        """
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: expected a folder of images for the split {self.split}, got no such folder")
        groups = [_images_in(folder) for folder in self._class_folders()] if self.num_classes else [self._flat()]
        self._paths = [path for group in groups for path in group]
        labels = [label for label, group in enumerate(groups) for _ in group]
        self._labels = torch.tensor(labels, dtype=torch.int64)
        # In shared memory: loader workers have copies of this object, and what they skip is counted in one place.
        self._bad = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def _flat(self) -> list[str]:
        paths = _images_in(self.folder)
        if not paths:
            raise BadInput(f"{self.folder}: expected images ({' '.join(SUFFIXES)}), got an empty folder")
        return paths

    def _class_folders(self) -> list[Path]:
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir())
        if len(folders) != self.num_classes:
            raise BadInput(
                f"{self.folder}: expected {self.num_classes} class folders (num_classes), got {len(folders)}"
            )
        for folder in folders:
            if not _images_in(folder):
                raise BadInput(f"{folder}: expected images ({' '.join(SUFFIXES)}), got an empty folder")
        return folders

    @property
    def skipped(self) -> int:
        """How many files could not be read so far, in all loader workers of this machine."""
        return int(self._bad.sum())

    def fingerprint(self) -> str:
        """Of the images' names and sizes in bytes."""
        names = "\n".join(f"{os.path.relpath(p, self.folder)} {os.path.getsize(p)}" for p in self._paths)
        return f"ImageFolder:{self.split}:{self.size}:{hashlib.sha256(names.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, H0, W0), `condition` with classes, `img_path` its file.

        Raises:
            BadInput: an image that cannot be read; with `skip`, if none can be read.
        """
        for k in (i % len(self) for i in range(index, index + len(self))):
            try:
                return self._sample(k)
            except BadInput as error:
                if self.on_bad_image == "error":
                    raise
                if not self._bad[k]:
                    _log.warning("%s; skipped", error)
                self._bad[k] = True
        raise BadInput(f"{self.folder}: expected at least one readable image, got {len(self)} that are not")

    def without_image(self, index: int) -> LabeledImageData:
        """Label and file, without reading the image; with `skip`, those of the image that is given in its place."""
        return super().without_image(index) if self.on_bad_image == "skip" else self._describe(index)

    def _describe(self, index: int) -> LabeledImageData:
        condition = ClassCondition(self._labels[index].clone(), self.num_classes) if self.num_classes else None
        return LabeledImageData(condition=condition, img_path=self._paths[index])

    def _sample(self, index: int) -> LabeledImageData:
        return replace(self._describe(index), img=read_image(self._paths[index]))


def _images_in(folder: Path) -> list[str]:
    """Image files at any depth, sorted, links followed."""
    walk = os.walk(folder, followlinks=True)
    return sorted(os.path.join(at, name) for at, _, names in walk for name in names if name.lower().endswith(SUFFIXES))


def read_image(path: str, content: bytes | None = None) -> Tensor:
    """Decode a file to uint8 RGB (3, H, W).

    Args:
        path: the file, or a name for errors where there is `content`.
        content: the encoded image, in place of the file's.

    Raises:
        BadInput: not an image, a truncated one, or one with more than 8 bits per channel, which conversion would clip.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits per channel (mode {file.mode})")
            pixels = np.array(file.convert("RGB"))
    # SyntaxError: Pillow's own, of a broken PNG chunk. DecompressionBombError is no subclass of the others.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: expected a readable image, got {type(error).__name__}: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
