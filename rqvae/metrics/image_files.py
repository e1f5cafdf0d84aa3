"""Writers of the image files that scores are computed from: folders of PNGs, npz of samples, ADM reference batches."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from rqvae.errors import BadInput
from rqvae.files import replacing
from rqvae.metrics.feature_files import Moments
from rqvae.metrics.images import ARRAY, LABELS, ImageSource

Images = ImageSource | np.ndarray
"""A source on the disk, or uint8 (N, H, W, 3)."""
BATCH = 64


def write_image_folder(path: Path, images: Images) -> None:
    """`000000.png` and so on, in the order of the images, in a folder that is made.

    Raises:
        BadInput: an array of another type or shape, or what `ImageSource` refuses.
    """
    path.mkdir(parents=True, exist_ok=True)
    for start, part in _batches(images):
        for i, image in enumerate(part):
            with replacing(path / f"{start + i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary)


def write_image_npz(path: Path, images: Images, labels: np.ndarray | None = None) -> None:
    """The ADM suite's sample file: `arr_0` images and, where there are labels (N,) int64, `arr_1`; streamed.

    Raises:
        BadInput: a name that does not end in .npz, labels of another length, or as `write_image_folder`.
    """
    if labels is not None and labels.shape != (_shape(images)[0],):
        raise BadInput(f"{path}: {LABELS}: expected {_shape(images)[0]} labels, got {labels.shape}")
    _write(path, images, {} if labels is None else {LABELS: labels})


def write_adm_reference(path: Path, images: Images, pooled: Moments, spatial: Moments) -> None:
    """The ADM suite's reference batch: `arr_0` images for precision and recall, statistics of FID and of sFID.

    Args:
        path: an npz.
        images: some of those that the statistics are of, or all; published batches have 10 000.
        pooled: `mu` (2048,) and `sigma`.
        spatial: `mu_s` (2023,) and `sigma_s`.

    Raises:
        BadInput: as `write_image_npz`.
    """
    statistics = {"mu": pooled.mean, "sigma": pooled.cov, "mu_s": spatial.mean, "sigma_s": spatial.cov}
    _write(path, images, statistics)


def _write(path: Path, images: Images, others: dict[str, np.ndarray]) -> None:
    if path.suffix != ".npz":
        raise BadInput(f"{path}: expected a name that ends in .npz")
    header = {"descr": "|u1", "fortran_order": False, "shape": _shape(images)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Member by member: 50,000 images of 256 px are 10 GB, which np.savez would want as one array.
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, part in _batches(images):
                file.write(part.tobytes())
        for key, array in others.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _shape(images: Images) -> tuple[int, ...]:
    if isinstance(images, ImageSource):
        return images.shape
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise BadInput(f"images: expected uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    return images.shape


def _batches(images: Images) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first image, and (B, H, W, 3)."""
    if isinstance(images, ImageSource):
        for part, positions in images.batches(BATCH):
            yield int(positions[0]), np.ascontiguousarray(part.permute(0, 2, 3, 1).numpy())
        return
    for start in range(0, _shape(images)[0], BATCH):
        yield start, np.ascontiguousarray(images[start : start + BATCH])
