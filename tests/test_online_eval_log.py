"""Scores while training, as people see them: the cadence, the bar, the log, W&B, and FID of two averages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rqvae.configuration import read
from rqvae.metrics.feature_files import read_features
from rqvae.scripts import COMMANDS, translate
from tests.conftest import only, rows
from tests.inception_weights import write_random_inception
from tests.test_online_eval import KEY, report, words


class WandbRun:
    """What `wandb.init` gives; its own process writes files some time after `finish`."""

    id = "abc"

    def __init__(self) -> None:
        self.rows: dict[int, dict] = {}

    def log(self, values: dict, step: int) -> None:
        self.rows.setdefault(step, {}).update(values)

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("stage", [1, 2])
def test_every_so_many_images_with_a_bar_in_the_log_and_in_wandb(
    stage: int, tmp_path: Path, cli, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 8: 16 images are 2 steps."""
    watched = WandbRun()
    monkeypatch.setattr("wandb.init", lambda **_: watched)
    more = ["--online_eval.every", "16 images", "--train.log_every", 1, "--online_eval.images", 7]
    more += ["--logging.progress", "true", "--logging.wandb", "offline"]
    assert cli(*words(stage, tmp_path, *more, steps=5)) == 0
    run = only(tmp_path / "p", "r_*")
    assert [row["step"] for row in rows(run) if KEY in row] == [2, 4, 5], "and at the end"
    assert sorted(path.name for path in (run / "eval").glob("*.json")) == [f"step_0000000{i}.json" for i in (2, 4, 5)]
    assert {k: row[KEY] for k, row in watched.rows.items() if KEY in row} == {
        row["step"]: row[KEY] for row in rows(run) if KEY in row
    }
    shown = capfd.readouterr().err
    assert shown.count("evaluate:   0%|          | 0/7") == 3
    found = report(run, 4)
    assert (found["step"], found["images"], found["protocol"]["n"]) == (4, 32, 7)
    assert read_features(run / "eval" / "step_00000004.npz").n == 7


def test_the_scripts_and_the_stages_decide_whether_there_are_scores() -> None:
    line = ["project", "folder", "config.yaml", "1", "name"]
    flags = {script: " ".join(translate(script, line) or ()) for script in COMMANDS}
    assert "--do-online-eval True" in flags["train_stage1.sh"]
    assert "--do-online-eval False" in flags["train_stage1woeval.sh"]
    assert "online" not in flags["train_stage2.sh"]
    assert read(["configs/imagenet256/stage1/klvae/f_16.yaml"]).resolved["online_eval"]["metrics"] == [
        "psnr", "ssim", "rfid",
    ]  # fmt: skip
    for file in sorted(Path("configs/imagenet256/stage2").glob("*.yaml")):
        assert read([str(file)]).resolved["online_eval"]["every"] is None, "off until it is asked for"


@pytest.mark.slow
def test_fid_itself_is_of_the_average_that_is_named(tmp_path: Path, cli) -> None:
    """The network of FID with random weights; the same training, averages of decay 0 and 0.9999."""
    weights, scores = write_random_inception(tmp_path / "inception.pth"), {}
    inception = {"class_path": "rqvae.metrics.extractors.InceptionExtractor", "init_args": {"weights": str(weights)}}
    more = ["--online_eval.extractor", json.dumps(inception), "--online_eval.images", 8]
    for decay in (0.0, 0.9999):
        average = ["--ema.decays", f"[{decay}]", "--ema.warmup", "false"]
        assert cli(*words(2, tmp_path / str(decay), *more, *average, steps=8)) == 0
        run = only(tmp_path / str(decay) / "p", "r_*")
        scores[decay] = rows(run)[-1]["eval/gfid"]
        assert report(run, 8)["protocol"]["ema"] == f"ema_{decay:g}"
        assert report(run, 8)["protocol"]["extractor"] == "inception-2015-12-05"
    assert abs(scores[0.0] - scores[0.9999]) > 1e-3 * scores[0.0], scores
