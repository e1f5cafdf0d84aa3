"""Embedded natural images: the colour photos inside the scikit-image package, cut into patches.

They need no network and raise no question of licence: the docstrings of `skimage.data` name public domain, CC0 or no
known copyright restrictions for each of them (not for the stereo motorcycle, which is therefore left out). So tests,
debug configurations and a first try work on a fresh machine.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec, LabeledImageData, LabeledImageDataset, Split
from rqvae.randomness import generator

# The package's own registry would download what is not in the wheel; these files are in it.
FILES = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "hubble": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "rocket": "rocket.jpg",
}

BANDS: dict[Split, tuple[float, float]] = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
"""Part of each photo's width that belongs to a split."""


class SkimagePhotos(LabeledImageDataset):
    """Patches of photos, labelled with the photo they come from.

    Each photo is cut into three vertical bands, 70 % of its width for training and 15 % each for validation and test,
    so that no pixel is in two splits. Patches lie at fixed random places of the split's band. A band smaller than a
    patch (patches of more than 67 pixels) is enlarged, bicubic, until the patch fits.

    Sample i is patch i // P of photo i % P, P photos: any few neighbouring samples show different photos.

    Args:
        split: train, val or test.
        size: side of a patch in pixels.
        patches_per_photo: patches of each photo in the train split; val and test have a quarter of it, at least 1.
        photos: names out of `FILES`, in the order of their labels; None for all.

    Raises:
        BadInput: an unknown photo or one named twice, no photo, or a size or number of patches below 1.
    """

    def __init__(
        self, split: Split, *, size: int = 32, patches_per_photo: int = 64, photos: list[str] | None = None
    ) -> None:
        self.split = split
        self.size = size
        self.photos = list(FILES) if photos is None else list(photos)
        unknown = [name for name in self.photos if name not in FILES]
        if unknown or not self.photos or len(set(self.photos)) < len(self.photos):
            raise BadInput(f"photos: expected different names out of {', '.join(FILES)}, got {self.photos}")
        if size < 1 or patches_per_photo < 1:
            raise BadInput(f"size, patches_per_photo: expected at least 1, got {size}, {patches_per_photo}")
        self.patches = patches_per_photo if split == "train" else max(1, patches_per_photo // 4)
        self._bands: list[Tensor] = []
        self._corners = torch.empty(0, 2, dtype=torch.int64)
        self._sha256 = ""

    @property
    def spec(self) -> DataSpec:
        """(3, size, size), one class per photo."""
        return DataSpec((3, self.size, self.size), num_classes=len(self.photos), names=tuple(self.photos))

    def open(self) -> None:
        """Read the photos.

        Raises:
            BadInput: a photo that the installed scikit-image does not have.
        """
        contents = [photo_file(name).read_bytes() for name in self.photos]
        self._sha256 = hashlib.sha256(b"".join(contents)).hexdigest()
        self._bands = [_band(photo_file(name), self.split, self.size) for name in self.photos]
        self._corners = torch.stack([self._corner(index) for index in range(len(self))])

    def _corner(self, index: int) -> Tensor:
        """Upper left corner (row, column) of a patch in its band."""
        patch, photo = divmod(index, len(self.photos))
        room = torch.tensor(self._bands[photo].shape[1:]) - self.size + 1
        host = generator("patch", self.split, self.photos[photo], patch)
        return (torch.rand(2, generator=host, dtype=torch.float64) * room).long()

    def fingerprint(self) -> str:
        """Of the photos' bytes and what is cut from them."""
        return f"SkimagePhotos:{self.split}:{self.size}:{self.patches}:{self._sha256}"

    def __len__(self) -> int:
        return self.patches * len(self.photos)

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, size, size), `condition` the photo's number."""
        photo = index % len(self.photos)
        row, column = self._corners[index].tolist()
        img = self._bands[photo][:, row : row + self.size, column : column + self.size].clone()
        return LabeledImageData(img=img, condition=ClassCondition(torch.tensor(photo), len(self.photos)))


def photo_file(name: str) -> Path:
    """Where the installed scikit-image has a photo of `FILES`.

    Raises:
        BadInput: it is not there.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise BadInput("photos: expected the package scikit-image, got none: pip install scikit-image")
    path = Path(spec.origin).parent / "data" / FILES[name]
    if not path.is_file():
        raise BadInput(f"photos: {name}: expected {path} in the installed scikit-image, got no such file")
    return path


def _band(path: Path, split: Split, size: int) -> Tensor:
    """The split's part of a photo, uint8 (3, H, W) with H, W >= size."""
    with Image.open(path) as file:
        photo = file.convert("RGB")
    left, right = (round(edge * photo.width) for edge in BANDS[split])
    band = photo.crop((left, 0, right, photo.height))
    if (smaller := min(band.size)) < size:
        band = band.resize(
            (max(size, round(band.width * size / smaller)), max(size, round(band.height * size / smaller))),
            Image.Resampling.BICUBIC,
        )
    return torch.from_numpy(np.array(band)).permute(2, 0, 1).contiguous()
