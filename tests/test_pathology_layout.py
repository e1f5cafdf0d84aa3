"""The judge of layouts: its score, and generators whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rqvae.metrics.segmentation import confusion_matrix, mean_iou
from tests.conftest import only

SHORT = "configs/pathology/short_test.yaml"


def test_mean_iou_is_the_mean_of_the_set_ratios() -> None:
    """Against sets of pixels; a pixel without a label does not count, a class that never occurs has no ratio."""
    torch.manual_seed(0)
    true, found = torch.randint(0, 5, (4, 9, 9)), torch.randint(0, 4, (4, 9, 9))
    ratios = []
    for k in range(4):
        a = {i for i, v in enumerate(true.flatten().tolist()) if v == k}
        b = {
            i
            for i, (v, t) in enumerate(zip(found.flatten().tolist(), true.flatten().tolist(), strict=False))
            if v == k and t < 4
        }
        ratios.append(len(a & b) / len(a | b))
    matrix = confusion_matrix(found, true, 4)
    assert matrix.sum() == (true < 4).sum()
    assert mean_iou(matrix) == pytest.approx(sum(ratios) / 4)
    wider = torch.zeros(6, 6, dtype=torch.int64)
    wider[:4, :4] = matrix
    assert mean_iou(wider) == pytest.approx(sum(ratios) / 4)
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))


def test_real_images_pass_for_samples_and_not_for_those_of_other_masks(tmp_path: Path, monkeypatch, cli) -> None:
    """A generator that gives the real image of each mask is as good as real; its images fit no other mask."""
    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.models.two_stage import TwoStage
    from rqvae.trainers import layout_control as part

    assert cli("train", SHORT, "--save-dir", tmp_path, "--project", "p", "--backend", "cpu") == 0
    folder = only(tmp_path / "p")
    run = read([folder / "config.yaml"], []).instantiate()
    dataset = run.data.make("test")[0]
    dataset.open()
    real = torch.stack([dataset[i].require_img() for i in range(4)]) / 255
    monkeypatch.setattr(TwoStage, "sample", lambda *_: None)
    monkeypatch.setattr(TwoStage, "decode", lambda *_: real)
    request = part.LayoutRequest(folder, images=4, judge_steps=60, judge_width=16, batch_size=4)
    scores = part.layout_control(run, backends.create("cpu"), request)
    assert scores["samples"] == scores["real"] > 0.5
    assert scores["share"] == 1
    assert scores["shuffled"] < 0.5 * scores["real"]
    assert scores["n"] == 4


def test_the_command_prints_and_writes_the_scores(tmp_path: Path, cli, capfd) -> None:
    assert cli("train", SHORT, "--save-dir", tmp_path, "--project", "p", "--backend", "cpu") == 0
    line = ["--images", 3, "--judge-steps", 2, "--batch-size", 2, "--json", tmp_path / "s.json", "--backend", "cpu"]
    assert cli("layout", only(tmp_path / "p"), *line) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["n"] == 3
    assert (
        f"mean IoU of 3 masks: real images {scores['real']:.3f}, samples {scores['samples']:.3f}"
        in capfd.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_trained_generator_keeps_the_layout_and_the_original_cannot(tmp_path: Path, cli) -> None:
    """procedural.yaml and procedural_legacy.yaml at half of their steps, judged alike: 20 minutes."""
    scores, judge = {}, ["--images", 48, "--judge-steps", 300, "--backend", "cpu"]
    for name in ("procedural", "procedural_legacy"):
        line = ["--save-dir", tmp_path / name, "--project", "p", "--backend", "cpu", "--logging.progress", "false"]
        more = ["--train.steps", 2000, "--pictures.every", "null"]
        assert cli("train", f"configs/pathology/{name}.yaml", *line, *more) == 0
        file = tmp_path / f"{name}.json"
        assert cli("layout", only(tmp_path / name / "p"), *judge, "--json", file) == 0
        scores[name] = json.loads(file.read_text())
    told, blind = scores["procedural"], scores["procedural_legacy"]
    assert told["real"] > 0.9
    assert told["share"] > 0.8
    assert told["shuffled"] < 0.35
    assert blind["share"] < 0.6
