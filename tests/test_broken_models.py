"""What a model that is not finite leaves behind: a line and an exit code, no images and no score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.interfaces import Stage1Encodings
from rqvae.models.interfaces import Stage1ModelOutput
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.trainers.evaluation_trainer import as_pictures, finite_pictures
from tests.conftest import only

STAGE1, STAGE2 = "configs/debug/stage1.yaml", "configs/debug/stage2.yaml"


class Broken(PixelStage1):
    """An image of each batch is not finite: NaN, or infinity, which a clamp would turn into white."""

    def __init__(self, patch: int = 2, value: float = float("nan")) -> None:
        super().__init__(patch)
        self.value = value

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        output = super().decode(encodings)
        xs = output.xs_recon.clone()
        xs[1, 0, 0, 0] = self.value
        return replace(output, xs_recon=xs)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_reconstructions_that_are_not_finite_are_not_written(tmp_path: Path, cli, capfd, value: str) -> None:
    stage1 = f"{{class_path: tests.test_broken_models.Broken, init_args: {{value: .{value}}}}}"
    line = ["recon", STAGE1, "--save-dir", tmp_path, "--run-name", "recon", "--stage1", stage1]
    for _ in range(2):  # again: what the first call left behind is no score either
        assert cli(*line) == 3
        said = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error: ")]
        assert len(said) == 1
        assert "reconstructions 0 to " in said[0]
        assert "1 of " in said[0]
        assert not list((tmp_path / "recon" / "images").iterdir())
        assert not (tmp_path / "recon" / "metrics.json").exists()


def test_samples_that_are_not_finite_are_not_written(tmp_path: Path, cli, capfd, monkeypatch) -> None:
    line = ["train", STAGE2, "--save-dir", tmp_path, "--project", "p", "--run-name", "r", "--train.steps", 1]
    assert cli(*line, "--online_eval.every", "null", "--pictures.every", "null") == 0
    run, out = only(tmp_path / "p"), tmp_path / "out"
    for value in ("nan", "inf"):
        assert cli("sample", run, "--out", out, "--cfg", value) == 2
        assert f"--cfg: expected a finite number, got {value}" in capfd.readouterr().err
    assert not out.exists()

    from rqvae.models.two_stage import TwoStage

    decode = TwoStage.decode

    def third_batch_breaks(self, output):
        images = decode(self, output)
        third_batch_breaks.calls += 1
        return images if third_batch_breaks.calls < 3 else images.fill_(torch.nan)

    third_batch_breaks.calls = 0
    monkeypatch.setattr(TwoStage, "decode", third_batch_breaks)
    assert cli("sample", run, "--out", out, "--num", 10, "--batch-size", 4, "--steps", 1) == 3
    assert f"{out}: samples 8 to 9: 2 of 2 images are not finite" in capfd.readouterr().err
    assert not out.exists()
    assert len(list((tmp_path / "out.parts").glob("[0-9]*.npy"))) == 2, "finished batches are kept"


def test_pictures_are_those_of_finite_images_and_what_fills_up_a_batch_may_be_anything() -> None:
    images = torch.rand(4, 3, 5, 6)
    assert (finite_pictures(images, images, range(4), "x") == as_pictures(images)).all()
    images[3] = torch.nan
    assert (finite_pictures(images, images, [7, 8, 9], "x")[:3] == as_pictures(images[:3])).all()
    raw = torch.zeros(4, 2)
    raw[0, 1] = -torch.inf
    with pytest.raises(RunFailed, match=r"^x 7 to 9: 1 of 3 images are not finite$"):
        finite_pictures(images, raw, [7, 8, 9], "x")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_of_guidance_is_finite(scale: float) -> None:
    from rqvae.diffusion.guidance import Autoguidance, ClassifierFree, Interval

    for make in (ClassifierFree, Interval, lambda s: Autoguidance(torch.add, s)):
        with pytest.raises(BadInput, match="guidance: scale: expected a finite number"):
            make(scale)


def test_dreams_that_are_not_finite_are_not_scored(monkeypatch) -> None:
    from rqvae.api import load
    from rqvae.trainers.dream import Dream
    from rqvae.trainers.rollout import Dreamer

    step = Dream.step

    def broken(self: Dream, action_b: torch.Tensor, noise_bchw: torch.Tensor) -> torch.Tensor:
        frames = step(self, action_b, noise_bchw)
        frames[-1, 0, 0, 0] = torch.nan
        return frames

    monkeypatch.setattr(Dream, "step", broken)
    two_stage = load("maze-chase").two_stage
    assert two_stage is not None
    context, past, ahead = np.zeros((2, 4, 32, 32, 3), np.uint8), np.zeros((2, 3), int), np.zeros((2, 2), int)
    with pytest.raises(RunFailed, match="frame 1 of the dreams from starts 0 to 1: 1 of 2 images are not finite"):
        Dreamer(two_stage, 5)(context, past, ahead, seed=0)


def test_a_canvas_that_is_not_finite_is_not_written() -> None:
    from rqvae.models.interfaces import Stage2Model, base_connector
    from rqvae.models.two_stage import TwoStage
    from rqvae.trainers.canvas import decode_canvas

    two_stage = TwoStage(PixelStage1(2), base_connector(), Stage2Model(), (3, 8, 8))
    latent = torch.zeros(12, 8, 8)
    latent[0, 0, 0] = torch.inf
    with pytest.raises(RunFailed, match="canvas: .* of 256 pixels are not finite"):
        decode_canvas(two_stage, latent, 4)
