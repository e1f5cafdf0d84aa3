"""Canvases: every position once a step, any size, any order of tiles, the small image as a special case, seams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.configuration import read
from rqvae.diffusion.canvas import Tilings
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import MaskCondition
from rqvae.mask_colours import coloured
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator
from rqvae.trainers.canvas import CanvasRequest, sample_canvas, seam_ratio
from rqvae.trainers.painted_masks import read_painted
from rqvae.trainers.stage2_trainer import make_two_stage
from tests.conftest import only

SHORT = "configs/pathology/short_test.yaml"


@pytest.fixture
def two_stage() -> TwoStage:
    """The small network of the short test with random weights everywhere, none of them zero."""
    built = make_two_stage(read([SHORT]).instantiate()).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in built.stage2.parameters():
            weight.normal_(std=0.05)
    return built


def mask_of(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return (
        torch.randint(0, 6, (-(-height // 8), -(-width // 8)), generator=generator)
        .repeat_interleave(8, 0)
        .repeat_interleave(8, 1)[:height, :width]
    )


@pytest.mark.parametrize("canvas", [(16, 16), (16, 61), (37, 100)])
@pytest.mark.parametrize("overlap", [0, 4, 15])
def test_every_position_is_kept_once_and_seen(canvas: tuple[int, int], overlap: int) -> None:
    tilings = Tilings(canvas, (16, 16), overlap, seed=1)
    seams = []
    for step in range(8):
        kept = torch.zeros(canvas, dtype=torch.int64)
        for tile in tilings.at(step):
            kept[tile.rows[0] : tile.rows[1], tile.columns[0] : tile.columns[1]] += 1
            assert 0 <= tile.top <= tile.rows[0]
            assert tile.rows[1] <= tile.top + 16 <= canvas[0]
            assert 0 <= tile.left <= tile.columns[0]
            assert tile.columns[1] <= tile.left + 16 <= canvas[1]
        assert (kept == 1).all()
        seams.append(tuple(tilings.edges(step)[1]))
    assert len(set(seams)) > 1 or overlap == 15  # windows that keep one column have one tiling


def test_the_same_image_for_another_order_of_tiles_and_other_batches(two_stage: TwoStage) -> None:
    mask = mask_of(70, 90)
    request = CanvasRequest(steps=3, seed=4, batch_size=4)
    first, facts = sample_canvas(two_stage, mask, request)
    assert facts["tiles"] > 8
    again, _ = sample_canvas(two_stage, mask, request, order=lambda step, n: torch.randperm(n).tolist())
    assert np.array_equal(first, again)
    others = sample_canvas(two_stage, mask, CanvasRequest(steps=3, seed=4, batch_size=7))[0]
    assert np.abs(first.astype(int) - others).max() <= 1  # sums of floats in another order
    assert not np.array_equal(first, sample_canvas(two_stage, mask, CanvasRequest(steps=3, seed=5, batch_size=4))[0])


@pytest.mark.parametrize("size", [(32, 32), (7, 9), (33, 64), (50, 101)])
def test_any_size(two_stage: TwoStage, size: tuple[int, int]) -> None:
    image, facts = sample_canvas(two_stage, mask_of(*size), CanvasRequest(steps=2, overlap=0))
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    assert facts["steps"] == 2


def test_a_canvas_of_one_tile_is_the_ordinary_sample(two_stage: TwoStage) -> None:
    """The same noise, DDIM of the same steps with guidance, by the sampler itself."""
    mask = mask_of(32, 32)
    image, facts = sample_canvas(two_stage, mask, CanvasRequest(seed=3, shifted=False, overlap=0))
    noise = torch.randn((12, 16, 16), generator=generator(3, "canvas noise"))[None]
    with torch.no_grad():
        ordinary = two_stage.decode(two_stage.sample(MaskCondition(mask[None], 5), noise))
    expected = (ordinary[0].clamp(0, 1) * 255).permute(1, 2, 0)
    assert facts["tiles"] == 1
    assert (torch.from_numpy(image) - expected).abs().max() < 1.01


def test_seam_ratio_is_one_without_seams_and_says_where_there_are() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(100, 110, (64, 96, 3)).astype(np.uint8)
    edges = [[0, 20, 52, 64], [0, 30, 62, 96]]
    assert seam_ratio(image, edges, (2, 2)) == pytest.approx(1, abs=0.05)
    stepped = image.copy()
    stepped[:, 30:62] += 40
    assert seam_ratio(stepped, edges, (2, 2)) > 3
    assert np.isnan(seam_ratio(image, [[0, 64], [0, 96]], (2, 2)))


def test_a_painted_mask_is_read_back(tmp_path: Path) -> None:
    mask = mask_of(40, 24)
    picture = coloured(mask[None].numpy(), 5)[0].transpose(1, 2, 0)
    Image.fromarray(picture).save(tmp_path / "painted.png")
    assert torch.equal(read_painted(tmp_path / "painted.png", 5), mask)
    numbers = mask.clamp(max=4).to(torch.uint8)
    Image.fromarray(numbers.numpy()).save(tmp_path / "numbers.png")
    assert torch.equal(read_painted(tmp_path / "numbers.png", 5), numbers.long())
    Image.fromarray(picture).quantize(16).save(tmp_path / "indexed.png")
    assert torch.equal(read_painted(tmp_path / "indexed.png", 5), mask), "painted, saved with a palette"
    indexed = Image.fromarray(numbers.numpy(), mode="P")
    indexed.putpalette([7, 7, 7, 9, 9, 9, 20, 0, 0, 0, 20, 0, 0, 0, 20])
    indexed.save(tmp_path / "numbered.png")
    assert torch.equal(read_painted(tmp_path / "numbered.png", 5), numbers.long()), "numbers in colours of their own"
    picture[7, 3] = (1, 2, 3)
    Image.fromarray(picture).save(tmp_path / "painted.png")
    with pytest.raises(BadInput, match=r"expected colours of classes \(0 #ffffff, .*got #010203 at row 7, column 3"):
        read_painted(tmp_path / "painted.png", 5)


def test_the_command(tmp_path: Path, cli, capfd) -> None:
    assert cli("train", SHORT, "--save-dir", tmp_path, "--project", "p", "--backend", "cpu") == 0
    Image.fromarray(mask_of(45, 70).clamp(max=4).to(torch.uint8).numpy()).save(tmp_path / "mask.png")
    line = ["canvas", only(tmp_path / "p"), tmp_path / "mask.png", "--out", tmp_path / "out.png", "--backend", "cpu"]
    assert cli(*line) == 0
    assert Image.open(tmp_path / "out.png").size == (70, 45)
    facts = json.loads((tmp_path / "out.json").read_text())
    assert f"out.png: 70 x 45, {facts['tiles']} tiles in 4 steps" in capfd.readouterr().out
    for change, words in (
        (["--overlap", 16], "overlap: expected a number in [0, 15], got 16"),
        (["--steps", 0], "--steps: expected at least 1, got 0"),
        (["--out", tmp_path / "no" / "x.png"], "expected a .png in a folder that exists"),
    ):
        assert cli(*line, *change) == 2
        assert words in capfd.readouterr().err
