"""Crops and flips: against an independent formulation of ADM's crop, and against masks and ramps painted here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, MaskCondition
from rqvae.img_datasets.transforms import Identity, TestTransform, TrainTransform, ValTransform, center_crop
from rqvae.randomness import generator


def adm_reference(image: Image.Image, target: int) -> np.ndarray:
    """The recipe again: pairs of columns, then of rows, averaged to whole grey levels while the image can be halved,
    then cubic, then the middle. For even sizes only.
    """
    while min(image.size) >= 2 * target:
        x = np.asarray(image).astype(np.int64)
        x = (x[:, ::2] + x[:, 1::2] + 1) // 2
        x = (x[::2] + x[1::2] + 1) // 2
        image = Image.fromarray(x.astype(np.uint8))
    width, height = image.size
    if width < height:
        size = (target, round(height * (target / width)))
    else:
        size = (round(width * (target / height)), target)
    x = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (x.shape[0] - target) // 2, (x.shape[1] - target) // 2
    return x[top : top + target, left : left + target]


@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (200, 144), (31, 47), (128, 320), (50, 33)])
def test_adm_crop_against_an_independent_formulation(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), (32, 32))
    expected = adm_reference(Image.fromarray(pixels), 32)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 32, 32)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("target", [(32, 48), (48, 32), (17, 90)])
def test_crop_to_other_than_squares_keeps_the_middle_and_the_proportions(target: tuple[int, int]) -> None:
    """A linear ramp in both directions: the crop's values say which part of the image was kept."""
    height, width = 240, 200
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)
    crop = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), target).double()
    assert crop.shape == (3, *target)
    scale = max(target[0] / height, target[1] / width)
    rows = (height - 1) / 2 + (np.arange(target[0]) - (target[0] - 1) / 2) / scale
    columns = (width - 1) / 2 + (np.arange(target[1]) - (target[1] - 1) / 2) / scale
    inner = slice(3, -3)  # the kernel is cut at the image's edge
    assert np.abs(crop[0, inner, 5].numpy() - rows[inner]).max() < 0.6 / scale + 1
    assert np.abs(crop[1, 5, inner].numpy() - columns[inner]).max() < 0.6 / scale + 1


def test_sizes_that_fit_are_left_alone() -> None:
    img = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator(0))
    spec = DataSpec((3, 32, 32))
    for transform in (ValTransform(spec), TestTransform(spec), Identity(spec), TrainTransform(spec, flip=False)):
        assert torch.equal(transform(LabeledImageData(img=img), generator(0)).require_img(), img)
    with pytest.raises(BadInput, match=r"img: expected \(3, 16, 16\), got \(3, 32, 32\)"):
        Identity(DataSpec((3, 16, 16)))(LabeledImageData(img=img), generator(0))
    with pytest.raises(BadInput, match="img: expected uint8"):
        ValTransform(spec)(LabeledImageData(img=img.float()), generator(0))


def test_flip_is_the_samples_own() -> None:
    img = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    transform = TrainTransform(DataSpec((3, 4, 4)))
    flipped = []
    for position in range(200):
        out = transform(LabeledImageData(img=img), generator(0, "augment", position)).require_img()
        again = transform(LabeledImageData(img=img), generator(0, "augment", position)).require_img()
        assert torch.equal(out, again)
        assert torch.equal(out, img) or torch.equal(out, img.flip(-1))
        flipped.append(torch.equal(out, img.flip(-1)))
    assert 70 < sum(flipped) < 130, "p = 0.5, 4 standard deviations"
    for fixed in (ValTransform, TestTransform):
        out = [fixed(DataSpec((3, 4, 4)))(LabeledImageData(img=img), generator(k)).require_img() for k in range(20)]
        assert all(torch.equal(x, img) for x in out)


def test_mask_goes_with_its_image() -> None:
    """The mask is painted as an image too; after crop and flip both must still agree, but for mixed pixels at edges."""
    mask = torch.zeros(90, 150, dtype=torch.int64)
    mask[20:60, 30:80], mask[50:85, 90:140] = 7, 300
    img = torch.stack([(mask == 7) * 255, (mask == 300) * 255, torch.zeros_like(mask)]).to(torch.uint8)
    transform = TrainTransform(DataSpec((3, 32, 32), num_mask_classes=301))
    seen = set()
    for k in range(8):
        out = transform(LabeledImageData(img=img, condition=MaskCondition(mask, 301)), generator(k))
        assert isinstance(out.condition, MaskCondition)
        new = out.condition.mask
        assert new.shape == (32, 32)
        assert new.dtype == torch.int64
        assert set(new.unique().tolist()) <= {0, 7, 300}
        painted = torch.where(out.require_img()[0] > 127, 7, torch.where(out.require_img()[1] > 127, 300, 0))
        assert (painted == new).float().mean() > 0.95
        seen.add(bool(new[:, :16].eq(7).sum() > new[:, 16:].eq(7).sum()))
    assert seen == {True, False}, "both with and without a flip"
    with pytest.raises(BadInput, match=r"condition\.mask"):
        transform(LabeledImageData(img=img, condition=MaskCondition(mask[:50], 301)), generator(0))
