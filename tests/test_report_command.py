"""`python -m rqvae report RUN [RUN ...]`: what is on the page is what the runs' files hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rqvae.reports.metrics_file import Metrics
from rqvae.reports.run_files import read_run
from rqvae.reports.run_report import distinct_names
from rqvae.reports.summary import best, direction
from tests.conftest import only
from tests.conftest import rows as rows_of
from tests.test_reports import Reader, line_points, make_run, write_rows

BLUE, ORANGE = "#3b7ddd", "#e07b1a"


def page_of(cli: Any, out: Path, *arguments: object) -> Reader:
    assert cli("report", *arguments, "--out", out) == 0
    return Reader(out)


def test_runs_of_both_stages_on_one_page(tmp_path: Path, cli) -> None:
    """Real runs: every value that was logged has its last number on the page, and every difference its row."""
    off = ["--online_eval.every", "null", "--train.steps", 4, "--save-dir", tmp_path, "--project", "p"]
    small = ["--pictures.every", "2 steps"]
    assert cli("train", "configs/debug/stage1.yaml", *off, *small, "--run-name", "kl") == 0
    assert cli("train", "configs/debug/stage2.yaml", *off, *small, "--run-name", "dit", "--train.seed", 3) == 0
    runs = [only(tmp_path / "p", "kl_*"), only(tmp_path / "p", "dit_*")]
    page = page_of(cli, tmp_path / "both.html", *runs)

    for run in runs:
        last = rows_of(run)[-1]
        for key, value in last.items():
            if "/" in key and "_per_s" not in key:
                assert value in page.numbers, key
        assert float(np.median([row["train/images_per_s"] for row in rows_of(run)])) in page.numbers
        for count in json.loads((run / "environment.json").read_text())["parameters"].values():
            assert count in page.numbers
    table = {row[0]: row[1:] for row in page.rows}
    assert table["train.seed"] == ["0", "3"]
    assert "train.steps" not in table
    assert table["stage1.class_path"] == ["rqvae.models.stage1.kl_vae.KLVAE", "rqvae.models.stage1.pixel.PixelStage1"]
    assert page.tags.count("img") == 2
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)


def test_a_run_that_was_started_from_another_is_one_curve(tmp_path: Path, cli) -> None:
    """20 steps are drawn as 15 of the first run and 5 of its own, not as 5, and not as 20 and 5."""
    line = ["train", "configs/debug/stage2.yaml", "--save-dir", tmp_path, "--project", "p", "--pictures.every", "null"]
    assert cli(*line, "--run-name", "first") == 0
    first = only(tmp_path / "p", "first_*")
    checkpoint = first / "checkpoints" / "step_00000015"
    assert cli(*line, "--run-name", "second", "--resume-ckpt", checkpoint, "--updates.generator.lr", 1e-4) == 0
    second = only(tmp_path / "p", "second_*")
    assert [row["step"] for row in rows_of(second)] == [16, 17, 18, 19, 20]
    read = read_run(second)
    assert read.continues == (first.name,)
    expected = [row["train/loss_total"] for row in rows_of(first)[:15] + rows_of(second)]
    steps, values = read.metrics.series("train/loss_total")
    assert steps.tolist() == list(range(1, 21))
    assert values.tolist() == expected

    page = page_of(cli, tmp_path / "r.html", second)
    assert ["started from", first.name] in page.rows
    # over three generations, and where the first one is gone
    third = make_run(tmp_path / "p" / "third", steps=30)
    write_rows(third / "metrics.jsonl", [{"step": 21, "images": 168, "time": 2e9, "train/loss_total": 0.5}])
    (third / "environment.json").write_text(json.dumps({"resumed_from": str(second)}))
    assert read_run(third).metrics.series("train/loss_total")[1].tolist() == [*expected, 0.5]
    assert read_run(third).continues == (first.name, second.name)
    second.rename(tmp_path / "elsewhere")
    assert read_run(third).metrics.series("train/loss_total")[1].tolist() == [0.5]


def test_a_run_that_went_on_in_its_folder_is_one_curve(tmp_path: Path, cli) -> None:
    """The rows of both processes are one line of the drawing."""
    run = make_run(tmp_path / "run", steps=20)
    page = page_of(cli, tmp_path / "r.html", run)
    svg = re.findall(r"<svg.*?</svg>", (tmp_path / "r.html").read_text(), re.DOTALL)[0]
    drawn = line_points(svg, BLUE, "1.5")
    assert [len(points) for points in drawn if len(points) > 1] == [20, 20], "linear and log"
    assert 20 in page.numbers


def test_every_run_has_its_line_and_its_name(tmp_path: Path, cli) -> None:
    runs = [make_run(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    page = page_of(cli, tmp_path / "r.html", *runs)
    svg = re.findall(r"<svg.*?</svg>", (tmp_path / "r.html").read_text(), re.DOTALL)[0]
    for colour in (BLUE, ORANGE, "#1f9d78"):
        assert line_points(svg, colour, "1.5")
    for name in ("a", "b", "c"):
        assert f">{name}</text>" in svg
    # pictures side by side: one gallery of three
    assert page.tags.count("img") == 3
    assert (tmp_path / "r.html").read_text().count('<div class="gallery">') == 1
    assert "a, step 60" in page.text
    assert page.rows[-1] == ["train.seed", "1", "2", "3"]


def test_last_and_best_are_those_of_the_rows(tmp_path: Path, cli) -> None:
    rows = [
        {"step": 10, "images": 80, "time": 1.0, "val/psnr": 20.0, "train/loss_recon": 0.5, "train/lr": 3.0},
        {"step": 20, "images": 160, "time": 2.0, "val/psnr": 31.5, "train/loss_recon": 0.125, "train/lr": 2.0},
        {"step": 30, "images": 240, "time": 3.0, "val/psnr": None, "train/loss_recon": 0.25, "train/lr": 1.0},
    ]
    run = make_run(tmp_path / "run")
    write_rows(run / "metrics.jsonl", rows)
    page = page_of(cli, tmp_path / "r.html", run)
    assert ["val/psnr", "–", "31.5", "20"] in page.rows
    assert ["train/loss_recon", "0.25", "0.125", "20"] in page.rows
    assert ["train/lr", "1", "–", "–"] in page.rows


@pytest.mark.parametrize(
    ("key", "way"),
    [
        ("val/psnr", 1),
        ("eval/recall", 1),
        ("eval/is", 1),
        ("eval/rfid", -1),
        ("eval/fid_50k", -1),
        ("train/loss_total", -1),
        ("train/loss_gan", 0),
        ("train/loss_disc", 0),
        ("train/loss_latent", 0),
        ("train/grad_norm", 0),
        ("train/gan_weight", 0),
        ("train/distance", 0),
    ],
)
def test_which_way_is_better(key: str, way: int) -> None:
    assert direction(key) == way


def test_the_total_of_a_game_has_no_best() -> None:
    rows = [{"step": k, "train/loss_total": 1 / k} for k in (1, 2)]
    assert best(Metrics("r", rows), "train/loss_total") == (0.5, 2)
    assert best(Metrics("r", [*rows, {"step": 3, "train/loss_gan": 0.1}]), "train/loss_total") is None


def test_names_are_told_apart(tmp_path: Path, cli) -> None:
    same = [make_run(tmp_path / project / "run", seed) for project, seed in (("p", 1), ("q", 2))]
    assert distinct_names(same) == ["p/run", "q/run"]
    assert distinct_names([*same, tmp_path / "p" / "other"]) == ["p/run", "q/run", "p/other"]
    assert ["key", "p/run", "q/run"] in page_of(cli, tmp_path / "r.html", *same).rows


def test_environments_that_differ_are_shown(tmp_path: Path, cli) -> None:
    runs = [make_run(tmp_path / name, 1) for name in ("a", "b")]
    environment = json.loads((runs[1] / "environment.json").read_text())
    changed = {"commit": "0ddba11", "argv": ["train", "c.yaml"], "wandb_id": "x"}
    (runs[1] / "environment.json").write_text(json.dumps({**environment, **changed}))
    page = page_of(cli, tmp_path / "r.html", *runs)
    assert "The runs have equal configs." in page.text
    at = page.rows.index(["key", "a", "b"])
    assert page.rows[at + 1 :] == [["commit", "4be1c0ffee", "0ddba11"], ["argv", "–", "train c.yaml"]]


def test_the_same_runs_give_the_same_bytes(tmp_path: Path, cli) -> None:
    runs = [make_run(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    for out in ("1.html", "2.html"):
        page_of(cli, tmp_path / out, *runs, "--against", "images")
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def refused(cli: Any, capfd: Any, *arguments: object) -> str:
    """The one line that says why."""
    assert cli("report", *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_is_no_run_is_refused_by_name(tmp_path: Path, cli, capfd) -> None:
    run, out = make_run(tmp_path / "runs" / "run"), ("--out", tmp_path / "r.html")
    assert "there is none" in refused(cli, capfd, tmp_path / "nowhere", *out)
    assert "expected a run's folder" in refused(cli, capfd, run / "config.yaml", *out)
    folders = {"stage1.json": "reconstructions", "COMPLETE": "a checkpoint", "x.png": "pictures", "notes": "none of"}
    for file, words in folders.items():
        (tmp_path / f"with {file}").mkdir()
        (tmp_path / f"with {file}" / file).write_text("{}")
        line = refused(cli, capfd, tmp_path / f"with {file}", *out)
        assert f"with {file}: expected the folder of a training run" in line
        assert words in line
    assert "holds 1 of them, the last is run" in refused(cli, capfd, tmp_path / "runs", *out)
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl: expected the metrics of a run" in refused(cli, capfd, run, *out)
    (run / "metrics.jsonl").write_text("")
    assert "expected at least one row, got none" in refused(cli, capfd, run, *out)
    write_rows(run / "metrics.jsonl", [{"step": 1, "time": 1.0}])
    assert "expected rows with values" in refused(cli, capfd, run, *out)
    assert not (tmp_path / "r.html").exists()


def test_the_same_run_twice_is_refused(tmp_path: Path, cli, capfd) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    assert "got this one twice" in refused(cli, capfd, run, tmp_path / "link", "--out", tmp_path / "r.html")


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path, cli, capfd) -> None:
    run = make_run(tmp_path / "run")
    assert "expected a file that ends in .html" in refused(cli, capfd, run, "--out", run / "metrics.jsonl")
    (tmp_path / "folder.html").mkdir()
    assert "expected a file that ends in .html" in refused(cli, capfd, run, "--out", tmp_path / "folder.html")
    inside = run / "config.yaml" / "r.html"
    assert f"--out {inside}: expected a place that can be written" in refused(cli, capfd, run, "--out", inside)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "can be written" in refused(cli, capfd, run, "--out", tmp_path / "closed" / "r.html")
    assert "the following arguments are required: RUN" in refused(cli, capfd)
    assert "invalid choice: 'hours'" in refused(cli, capfd, run, "--against", "hours")
    assert len(rows_of(run)) == 60


def test_a_page_is_made_where_no_training_code_can_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from rqvae.cli import run\n"
        f"code = run(['report', {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}])\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'rqvae.trainers', 'rqvae.models')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (tmp_path / "r.html").exists()
