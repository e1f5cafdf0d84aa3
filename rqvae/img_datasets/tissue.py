"""Tissue that comes with the package: a stained section with masks made from its stains, and drawn textures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from PIL import Image
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData, MaskCondition, Split
from rqvae.img_datasets.pathology import MaskDataset
from rqvae.img_datasets.photos import BANDS, photo_file
from rqvae.randomness import generator

STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density in red, green and blue of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001)."""

HAEMATOXYLIN_LEVEL, DAB_LEVEL = 0.0234, 0.0575
"""Otsu's thresholds of the two stains over the whole of scikit-image's section, smoothed as here."""


def stain_densities(rgb_hwc: np.ndarray) -> np.ndarray:
    """Haematoxylin, eosin and DAB of a picture, by Beer and Lambert's law (Ruifrok & Johnston 2001).

    The scale is that of `skimage.color.rgb2hed`: densities to the base of 10^-6, negative ones are 0.

    Args:
        rgb_hwc: (H, W, 3) uint8.

    Returns:
        (H, W, 3) float64.
    """
    light = np.maximum(rgb_hwc.astype(np.float64) / 255, 1e-6)
    return np.maximum(np.log(light) / math.log(1e-6) @ np.linalg.inv(np.array(STAINS)), 0)


class IHCTissue(MaskDataset):
    """Patches of scikit-image's immunohistochemistry section (colon, 512 x 512), with masks from its stains.

    Classes: 0 background, 1 haematoxylin (nuclei), 2 DAB (the stained protein). Each split has a vertical band of the
    section to itself, as in `SkimagePhotos`; patches lie at fixed random places of it.

    Args:
        split: train, val or test.
        size: side of a patch in pixels, at most 76, which is the narrowest band.
        patches: of the train split; val and test have a quarter of it, at least 1.
        p_cond: see `Pathology`.

    Raises:
        BadInput: a number out of its range.
    """

    def __init__(self, split: Split, *, size: int = 64, patches: int = 512, p_cond: float | None = 0.8) -> None:
        names = ("background", "haematoxylin", "DAB")
        super().__init__(split, size=size, num_classes=3, p_cond=p_cond, unknown_class=None, names=names)
        if size > 76 or patches < 1:
            raise BadInput(f"size, patches: expected at most 76 and at least 1, got {size}, {patches}")
        self.patches = patches if split == "train" else max(1, patches // 4)
        self._band = torch.empty(0)
        self._mask = torch.empty(0)
        self._digest = ""

    def open(self) -> None:
        """Read the section and make its mask.

        Raises:
            BadInput: the installed scikit-image does not have it.
        """
        path = photo_file("immunohistochemistry")
        with Image.open(path) as file:
            section = np.array(file.convert("RGB"))
        mask = stain_mask(section)
        left, right = (round(edge * section.shape[1]) for edge in BANDS[self.split])
        self._band = torch.from_numpy(section[:, left:right]).permute(2, 0, 1).contiguous()
        self._mask = mask[:, left:right].contiguous()
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()
        ids = torch.arange(self.num_classes)
        patches = [self._cut(i)[1].flatten() for i in range(self.patches)]
        self._take(torch.stack([torch.isin(ids, patch) for patch in patches]))

    def _cut(self, index: int) -> tuple[Tensor, Tensor]:
        host = generator("patch", self.split, "ihc", index)
        room = torch.tensor(self._mask.shape) - self.size + 1
        row, column = (torch.rand(2, generator=host, dtype=torch.float64) * room).long().tolist()
        part = (..., slice(row, row + self.size), slice(column, column + self.size))
        return self._band[part].clone(), self._mask[part].clone()

    def fingerprint(self) -> str:
        """Of the section's bytes and what is cut from it."""
        return f"IHCTissue:{self.split}:{self.size}:{self.patches}:{self.p_cond}:{self._digest}"

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, size, size) and its mask."""
        img, mask = self._cut(index)
        return LabeledImageData(img=img, condition=MaskCondition(mask, self.num_classes))


def stain_mask(rgb_hwc: np.ndarray) -> Tensor:
    """(H, W) int64: 2 where DAB, averaged over 5 x 5, is above its level, else 1 where haematoxylin is, else 0."""
    stains = torch.from_numpy(stain_densities(rgb_hwc)).permute(2, 0, 1)
    smooth = F.avg_pool2d(F.pad(stains[None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)[0]
    haematoxylin = (smooth[0] > HAEMATOXYLIN_LEVEL).long()
    return torch.where(smooth[2] > DAB_LEVEL, 2, haematoxylin)


Texture = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(y (H, W), x (H, W) in pixels, random (6,) in [0, 1)) -> (3, H, W) in [0, 1]."""


def _colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue]).view(3, 1, 1)


def _fibres(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    angle = math.pi * r[0]
    wave = torch.sin((x * torch.cos(angle) + y * torch.sin(angle)) * (2 * math.pi / 7) + 6 * r[1])
    return _colour(0.9, 0.55, 0.7) + 0.1 * wave


def _nuclei(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    dots = torch.sin(x * (2 * math.pi / 8) + 6 * r[0]) * torch.sin(y * (2 * math.pi / 8) + 6 * r[1])
    return torch.where(dots > 0.25, _colour(0.25, 0.15, 0.5), _colour(0.7, 0.55, 0.8))


def _fat(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    walls = torch.minimum(
        torch.sin(x * (math.pi / 12) + 3 * r[0]).abs(), torch.sin(y * (math.pi / 12) + 3 * r[1]).abs()
    )
    return torch.where(walls < 0.15, _colour(0.8, 0.6, 0.7), _colour(0.97, 0.96, 0.96))


def _glands(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    radius = torch.hypot(y - y.max() * r[0], x - x.max() * r[1])
    return _colour(0.5, 0.6, 0.75) + 0.2 * torch.sin(radius * (2 * math.pi / 10) + 6 * r[2])


def _blood(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    waves = torch.sin(x * 0.9 + 6 * r[0]) + torch.sin(y * 1.1 + 6 * r[1]) + torch.sin((x - y) * 0.7 + 6 * r[2])
    return _colour(0.65, 0.15, 0.15) + 0.06 * waves


TEXTURES: dict[str, Texture] = {
    "fibres": _fibres,
    "nuclei": _nuclei,
    "fat": _fat,
    "glands": _glands,
    "blood": _blood,
}


class ProceduralTissue(MaskDataset):
    """Drawn tissue: Voronoi cells, each of one of five textures. No medical claim; it shows whether a layout is kept.

    Sample i of a split is a function of (split, i).

    Args:
        split: train, val or test.
        size: side in pixels.
        images: of the train split; val and test have a quarter of it, at least 1.
        cells: Voronoi cells of an image.
        unlabelled: share of the train split whose masks are not given, in [0, 1).
        p_cond: see `Pathology`.

    Raises:
        BadInput: a number out of its range.
    """

    def __init__(
        self,
        split: Split,
        *,
        size: int = 64,
        images: int = 2048,
        cells: int = 6,
        unlabelled: float = 0.0,
        p_cond: float | None = 0.8,
    ) -> None:
        names = tuple(TEXTURES)
        super().__init__(split, size=size, num_classes=len(names), p_cond=p_cond, unknown_class=None, names=names)
        if images < 1 or cells < 1 or not 0 <= unlabelled < 1:
            raise BadInput(
                f"images, cells, unlabelled: expected >= 1, >= 1, in [0, 1), got {images}, {cells}, {unlabelled}"
            )
        self.images, self.cells = images if split == "train" else max(1, images // 4), cells
        self.labelled = round(self.images * (1 - unlabelled)) if split == "train" else self.images

    def open(self) -> None:
        """Draw the masks, to know their classes."""
        ids = torch.arange(self.num_classes)
        present = torch.zeros(self.images, self.num_classes, dtype=torch.bool)
        for i in range(self.labelled):
            present[i] = torch.isin(ids, self._mask(self._host(i)))
        self._take(present)

    def _host(self, index: int) -> torch.Generator:
        return generator("tissue", self.split, index)

    def _mask(self, host: torch.Generator) -> Tensor:
        """(size, size) int64."""
        seeds_n2 = torch.rand(self.cells, 2, generator=host) * self.size
        kinds_n = torch.randint(self.num_classes, (self.cells,), generator=host)
        y, x = _grid(self.size)
        distance = torch.stack([torch.hypot(y - row, x - column) for row, column in seeds_n2])
        return kinds_n[distance.argmin(0)]

    def fingerprint(self) -> str:
        """Of the arguments: there is nothing else."""
        return f"ProceduralTissue:{self.split}:{self.size}:{self.images}:{self.cells}:{self.labelled}:{self.p_cond}"

    def without_image(self, index: int) -> LabeledImageData:
        """The mask, null for an unlabelled image."""
        if index >= self.labelled:
            return LabeledImageData(condition=self.null())
        return LabeledImageData(condition=MaskCondition(self._mask(self._host(index)), self.num_classes))

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, size, size) and its mask, null for an unlabelled image."""
        host = self._host(index)
        mask = self._mask(host)
        y, x = _grid(self.size)
        layers = torch.stack(
            [draw(y, x, torch.rand(6, generator=host)).expand(3, *y.shape) for draw in TEXTURES.values()]
        )
        img = layers.gather(0, mask.expand(1, 3, -1, -1))[0] + 0.02 * torch.randn(3, *y.shape, generator=host)
        pixels = (img.clamp(0, 1) * 255).round().to(torch.uint8)
        condition = MaskCondition(mask, self.num_classes) if index < self.labelled else self.null()
        return LabeledImageData(img=pixels, condition=condition)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """y and x (size, size) of the pixels' centres."""
    places = torch.arange(size) + 0.5
    return places[:, None].expand(size, size), places[None, :].expand(size, size)
