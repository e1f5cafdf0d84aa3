"""A generator of masks: masks as images, a latent of classes, and what comes out is a mask for the tissue models."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDataset, MaskCondition, Split, Stage1Encodings
from rqvae.img_datasets.mask_pictures import MaskPictures
from rqvae.img_datasets.pathology import MaskDataset
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.img_datasets.tissue import ProceduralTissue
from rqvae.mask_colours import coloured, palette
from rqvae.models.stage1.palette import PaletteStage1
from rqvae.trainers.painted_masks import read_painted
from tests.conftest import only

CONFIG = "configs/pathology/masks_procedural.yaml"


@pytest.mark.parametrize(("classes", "patch"), [(2, 1), (5, 2), (40, 4)])
def test_masks_come_back_exactly_through_one_hot_latents(classes: int, patch: int) -> None:
    mask = torch.randint(0, classes, (3, 8, 16), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(coloured(mask.numpy(), classes).copy()).float() / 255
    stage1 = PaletteStage1(classes, patch)
    latents = stage1.encode(LabeledImageData(img=images)).zs
    assert tuple(latents.shape[1:]) == stage1.latent_shape((3, 8, 16))
    for b, k, i, j in itertools.product(range(3), range(classes), range(patch), range(patch)):
        expected = np.where(mask[b, i::patch, j::patch] == k, 1, -1)
        assert np.array_equal(latents[b, (k * patch + i) * patch + j], expected)
    assert torch.equal(stage1.decode(Stage1Encodings(latents)).xs_recon, images)


def test_whatever_is_generated_is_a_mask() -> None:
    noise = torch.randn(4, 5 * 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = (PaletteStage1(5, 2).decode(Stage1Encodings(noise)).xs_recon * 255).round().to(torch.uint8)
    found = {tuple(colour) for colour in levels.movedim(1, -1).flatten(0, 2).tolist()}
    assert found == {tuple(colour) for colour in palette(5)[:5].tolist()}


def test_the_images_are_the_masks_of_the_labelled_ones() -> None:
    masks = partial(ProceduralTissue, size=16, images=40, unlabelled=0.25)
    dataset, source = MaskPictures("train", masks=masks), masks("train")
    dataset.open()
    source.open()
    assert len(dataset) == 30
    for index in (0, 29):
        condition = source[index].condition
        assert isinstance(condition, MaskCondition)
        assert np.array_equal(dataset[index].require_img(), coloured(condition.mask[None].numpy(), 5)[0])
    assert dataset.spec.image_shape == (3, 16, 16)
    assert dataset.spec.num_mask_classes == 0


class Unlabelled(MaskDataset):
    """Images without any mask."""

    def __init__(self, split: Split) -> None:
        super().__init__(split, size=8, num_classes=2, p_cond=None, unknown_class=None, names=())

    def open(self) -> None:
        self._take(torch.zeros(3, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (partial(SkimagePhotos, size=8), "masks: expected a dataset with masks, got SkimagePhotos"),
        (Unlabelled, "masks: expected labelled images in the train split, got none"),
    ],
)
def test_datasets_without_masks_are_refused(masks: partial[LabeledImageDataset], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        MaskPictures("train", masks=masks).open()


@pytest.mark.parametrize(
    ("classes", "patch", "words"),
    [(0, 1, "num_classes: .*got 0"), (256, 1, "num_classes: .*got 256"), (2, 0, "patch: .*got 0")],
)
def test_bad_numbers(classes: int, patch: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        PaletteStage1(classes, patch)


def test_a_side_that_the_patch_does_not_divide() -> None:
    with pytest.raises(BadInput, match="not divisible by the patch 4 of PaletteStage1"):
        PaletteStage1(3, 4).latent_shape((3, 8, 6))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--stage1.init_args.num_classes", 4], "got 4; the dataset has masks of 5"),
        (
            ["--data.dataset", '{"class_path": "rqvae.img_datasets.photos.SkimagePhotos", "init_args": {"size": 16}}'],
            "got 5; the dataset has no masks in colours",
        ),
    ],
)
def test_colours_that_are_no_class_of_the_model_are_refused(more: list[object], words: str, tmp_path, cli, capfd):
    """They would be encoded as the nearest class."""
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "masks"]
    assert cli("train", CONFIG, *more, *place) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "stage1.num_classes" in line
    assert words in line
    assert not (tmp_path / "p").exists()


def test_what_a_trained_generator_samples_can_be_painted_with(tmp_path: Path, cli, capfd) -> None:
    small = ["--data.dataset.init_args.masks.init_args.size", 16, "--data.dataset.init_args.masks.init_args.images", 32]
    small += ["--stage2.init_args.backbone.init_args.width", 8, "--train.steps", 2, "--checkpoint.every", 2]
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "masks"]
    assert cli("train", CONFIG, *small, "--pictures.every", "null", *place) == 0
    out = tmp_path / "masks"
    assert cli("sample", only(tmp_path / "p"), "--num", 2, "--steps", 2, "--out", out) == 0
    files = sorted(out.rglob("*.png"))
    assert len(files) == 2, capfd.readouterr().err
    for file in files:
        mask = read_painted(file, 5)
        assert mask.shape == (16, 16)
        assert int(mask.max()) < 5
