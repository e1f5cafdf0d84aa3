"""Images of 32 x 48 pixels through every stage, by the commands that a user gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import rqvae
from rqvae.configuration import read
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.models.connectors.reshape import ReshapeConnector
from rqvae.models.interfaces import Stage1Encodings
from tests.conftest import only, rows, tensors

HEIGHT, WIDTH = 32, 48


class Oblong(SkimagePhotos):
    """Photos of 40 x 60, which the transform crops to 32 x 48."""

    @property
    def spec(self) -> DataSpec:
        return DataSpec((3, HEIGHT, WIDTH), num_classes=len(self.photos), names=tuple(self.photos))

    def __getitem__(self, index: int) -> LabeledImageData:
        sample = super().__getitem__(index)
        return replace(sample, img=sample.require_img()[:, :40, :60])


DATA = ["--data.dataset.class_path", f"{__name__}.Oblong", "--data.dataset.init_args.size", 60]
SHORT = [
    "--project",
    "p",
    "--run-name",
    "r",
    "--train.steps",
    2,
    "--checkpoint.every",
    2,
    "--pictures.every",
    "2 steps",
]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KL-VAE of factor 2 with a discriminator, scored on the way."""
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("stage1")
    line = ["train", "configs/debug/stage1_gan.yaml", "--save-dir", folder, *DATA, *SHORT, "--data.workers", 0]
    assert run([str(word) for word in (*line, "--online_eval.every", "2 steps")]) == 0
    return only(folder / "p")


def test_transform_keeps_the_middle_upright() -> None:
    run = read(["configs/debug/stage1.yaml"], [str(word) for word in DATA]).instantiate()
    for split in ("train", "val", "test"):
        dataset, transform = run.data.make(split)  # type: ignore[arg-type]
        dataset.open()
        stored = dataset[0].require_img()
        cropped = transform(dataset[0], torch.Generator().manual_seed(0)).require_img().float()
        assert cropped.shape == (3, HEIGHT, WIDTH)
        small = Image.fromarray(stored.permute(1, 2, 0).numpy()).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        expected = torch.from_numpy(np.array(small)).permute(2, 0, 1).float()
        error = min((cropped - e).abs().mean() for e in (expected, expected.flip(2)))  # train flips every second
        assert error < 0.5 * (expected - expected.mean()).abs().mean()


def test_stage1_trains_scores_and_reconstructs(stage1: Path, tmp_path: Path, cli) -> None:
    last = rows(stage1)[-1]
    assert np.isfinite([last["val/psnr"], last["val/ssim"], last["train/loss_disc"]]).all()
    grid = Image.open(sorted((stage1 / "samples").iterdir())[0])
    assert grid.width / 4 / WIDTH == pytest.approx(grid.height / 2 / HEIGHT, rel=0.1), "four columns, two rows"
    line = ["recon", stage1 / "config.yaml", "--ckpt", stage1, "--save-dir", tmp_path, "--run-name", "recon"]
    assert cli(*line) == 0
    pictures = [Image.open(file) for file in (tmp_path / "recon" / "images").rglob("*.png")]
    assert pictures
    assert {picture.size for picture in pictures} == {(WIDTH, HEIGHT)}
    assert json.loads((tmp_path / "recon" / "metrics.json").read_text())


def test_pipeline_of_an_autoencoder(stage1: Path) -> None:
    pipeline = rqvae.load(stage1)
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    latents = pipeline.encode(images)
    assert latents.shape == (2, 4, HEIGHT // 2, WIDTH // 2)
    torch.testing.assert_close(pipeline.decode(latents), pipeline.reconstruct(images))


BACKBONES = {
    "dit": {"class_path": "rqvae.models.stage2.dit.DiT", "init_args": {"width": 32, "depth": 1, "heads": 2}},
    "unet": {
        "class_path": "rqvae.models.stage2.unet.UNet",
        "init_args": {
            "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1], "heads": 2, "norm_groups": 4,
        },
    },
    "uvit": {
        "class_path": "rqvae.models.stage2.uvit.UViT",
        "init_args": {
            "width": 8, "multipliers": [1], "blocks": 1, "token_width": 32, "depth": 1, "heads": 2, "norm_groups": 4,
        },
    },
}  # fmt: skip
SCALE_SHIFT = {"class_path": "rqvae.models.connectors.scale_shift.ScaleShift"}


@pytest.mark.parametrize("latent", ["pixel", "klvae"])
@pytest.mark.parametrize("name", BACKBONES)
def test_stage2_trains_samples_and_loads(name: str, latent: str, stage1: Path, tmp_path: Path, cli) -> None:
    config = yaml.safe_load(Path("configs/debug/stage2.yaml").read_text())
    config["stage2"]["init_args"]["backbone"] = BACKBONES[name]
    if latent == "klvae":
        config["stage1"] = yaml.safe_load((stage1 / "config.yaml").read_text())["stage1"]
        config |= {"stage1_checkpoint": str(stage1), "connector": SCALE_SHIFT}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert cli("train", file, "--save-dir", tmp_path, *DATA, *SHORT) == 0
    run = only(tmp_path / "p")
    assert tensors(run, 2)
    out = tmp_path / "samples.npz"
    assert cli("sample", run, "--num", 3, "--steps", 2, "--cfg", 2, "--out", out) == 0
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (3, HEIGHT, WIDTH, 3)
    pipeline = rqvae.load(run)
    assert pipeline.sample(2, steps=1).shape == (2, 3, HEIGHT, WIDTH)
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    if latent == "pixel":
        torch.testing.assert_close(pipeline.reconstruct(images), images, rtol=0, atol=1e-6)
    else:
        assert pipeline.two_stage is not None
        torch.testing.assert_close(pipeline.two_stage.reconstruct(images), pipeline.reconstruct(images))


def test_tokens_in_row_major_order_become_an_oblong_map() -> None:
    rows_, columns = 4, 6
    places = torch.arange(rows_ * columns, dtype=torch.float32).view(1, -1, 1)
    connector = ReshapeConnector(height=rows_, width=columns)
    maps = connector(Stage1Encodings(places)).zs
    assert maps.shape == (1, 1, rows_, columns)
    assert maps[0, 0, 2, 5] == 2 * columns + 5
    assert torch.equal(connector.reverse(Stage1Encodings(maps)).zs, places)


def test_dry_run_of_an_oblong_image(tmp_path: Path, cli) -> None:
    line = ["train", "configs/debug/stage2.yaml", "--dry-run", "--json", tmp_path / "facts.json", *DATA]
    assert cli(*line) == 0
    shapes = json.loads((tmp_path / "facts.json").read_text())["shapes"]
    assert shapes["image"] == [3, HEIGHT, WIDTH]
    assert shapes["latent"] == [12, HEIGHT // 2, WIDTH // 2]
