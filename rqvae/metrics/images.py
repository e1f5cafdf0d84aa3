"""Images to be scored, from a folder or an npz of samples, in batches and in bounded memory."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.files import file_sha256

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
DEEP = {"F": "floats", "I": "32 bits"}
"""Pillow's modes; I;16 and its relatives have 16."""
PROVENANCE, MASKS = "provenance.json", "masks"
"""What `rqvae sample` leaves beside the images of a folder: how they were made, and their masks."""
ARRAY, LABELS = "arr_0", "arr_1"


class ImageSource:
    """Equally large 8-bit RGB images in a fixed order.

    Args:
        path: a folder, searched below, in the order of the names, without the masks that `rqvae sample` writes below
            samples that were made from masks; or an npz with `arr_0`, uint8 (N, H, W, 3), as the
            ADM suite has it. The npz is streamed, never loaded.

    Raises:
        BadInput: nothing there, no image, or an array of another type or shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Path] = []
        if path.is_dir():
            masks = path / MASKS if (path / PROVENANCE).is_file() else None
            found = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            self.files = sorted(p for p in found if masks not in p.parents)
            if not self.files:
                raise BadInput(f"{path}: expected images ({' '.join(sorted(SUFFIXES))}), found none")
            height, width, _ = read_image(self.files[0]).shape
            self.shape = (len(self.files), height, width, 3)
        else:
            with open_npz(path) as archive:
                self.shape = _open_array(path, archive)[1]

    def __len__(self) -> int:
        return self.shape[0]

    def sha256(self) -> str:
        """Of the npz, or of the names and contents of all images of the folder."""
        if not self.files:
            return file_sha256(self.path)
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.path)} {file_sha256(file)}\n".encode())
        return digest.hexdigest()

    @property
    def format(self) -> str:
        """How the images are stored: `npz`, `png`, `jpeg`, or several of them joined by +."""
        suffixes = {file.suffix.lower().removeprefix(".") for file in self.files}
        return "+".join(sorted({"jpeg" if s == "jpg" else s for s in suffixes})) or "npz"

    def labels(self) -> np.ndarray | None:
        """(N,) integers, `arr_1` of an npz, or None."""
        if self.files:
            return None
        with open_npz(self.path) as archive:
            if f"{LABELS}.npy" not in archive.namelist():
                return None
        labels = load_npz(self.path, (LABELS,))[LABELS].squeeze()
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise BadInput(f"{self.path}: {LABELS}: expected {len(self)} integers, got {labels.dtype} {labels.shape}")
        return labels

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and their positions.

        Args:
            size: images of a batch; the last may be shorter.
            first: this rank, of `step` ranks: it gets the batches first, first + step, ... Every image is in one batch.
            step: ranks.

        Yields:
            (B, 3, H, W) uint8 and (B,) int64.

        Raises:
            BadInput: images of several sizes, or a file that ends early.
        """
        chunks = self._from_folder(size, first, step) if self.files else self._from_npz(size, first, step)
        for start, images_bhwc in chunks:
            images = torch.from_numpy(images_bhwc).permute(0, 3, 1, 2).contiguous()
            yield images, torch.arange(start, start + len(images))

    def _from_folder(self, size: int, first: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(first * size, len(self), step * size):
            images = []
            for file in self.files[start : start + size]:
                image = read_image(file)
                if image.shape != self.shape[1:]:
                    sizes = f"{self.shape[1:3]} as of {self.files[0].name}, got {image.shape[:2]}"
                    raise BadInput(f"{file}: expected images of one size, {sizes}")
                images.append(image)
            yield start, np.stack(images)

    def _from_npz(self, size: int, first: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
        per_image = int(np.prod(self.shape[1:]))
        with open_npz(self.path) as archive:
            file, _ = _open_array(self.path, archive)
            for number, start in enumerate(range(0, len(self), size)):
                count = min(size, len(self) - start)
                try:
                    data = file.read(count * per_image)
                except (EOFError, zlib.error, zipfile.BadZipFile) as error:
                    raise BadInput(f"{self.path}: {ARRAY}: damaged at image {start} ({error})") from error
                if len(data) != count * per_image:
                    raise BadInput(f"{self.path}: {ARRAY}: expected {len(self)} images, the file ends at {start}")
                if number % step == first:
                    yield start, np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:]).copy()


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8.

    Raises:
        BadInput: not an image that can be read, or one of floats or of more than 8 bits, which Pillow would clip to 255
            without a word.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode[0] not in "FI":
                return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise BadInput(f"{path}: expected an image: {error}") from error
    raise BadInput(f"{path}: expected an image of 8 bits, got one of {DEEP.get(mode, '16 bits')}")


def open_npz(path: Path) -> zipfile.ZipFile:
    """The archive of an npz file.

    Raises:
        BadInput: no such file, or none of that kind.
    """
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        reason = "no such file" if not path.exists() else f"expected a complete npz ({error})"
        raise BadInput(f"{path}: {reason}") from error


def load_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an npz under those of `keys` that it has; objects, which would run code, are refused.

    Raises:
        BadInput: a damaged file, or an array of objects.
    """
    open_npz(path).close()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays.files}
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"{path}: expected arrays of numbers: {reason}") from error


def _open_array(path: Path, archive: zipfile.ZipFile) -> tuple[IO[bytes], tuple[int, int, int, int]]:
    """The images' stream behind its header, and their shape."""
    name = f"{ARRAY}.npy"
    if name not in archive.namelist():
        found = ", ".join(n.removesuffix(".npy") for n in archive.namelist()[:8])
        raise BadInput(f"{path}: expected the key {ARRAY} (uint8 images), found {found or 'nothing'}")
    file = archive.open(name)
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: {ARRAY}: expected an array of format 1.0 or 2.0 ({error})") from error
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
        raise BadInput(f"{path}: {ARRAY}: expected uint8 (N, H, W, 3) in C order, got {dtype} {shape}")
    return file, shape
