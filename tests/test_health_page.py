"""Restarts, checkpoints and evaluations on the curves of the page, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from rqvae.health.curves import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Moment, curve
from rqvae.health.examine import examine
from rqvae.health.log import Series
from rqvae.health.readers import read_log
from rqvae.health.report_html import as_html
from tests.browser import chromium
from tests.health_logs import dit, guided_text, healthy

SAVED = (5000, 10000, 15000)


def places(page: str, kind: str) -> list[float]:
    """Horizontal places of the signs of a kind, the one that explains it left out."""
    found = re.findall(rf'<path d="M([\d.]+) ([\d.]+)[^"]*" class="e {kind}"/>', page)
    return [float(x) for x, y in found if float(y) < HEIGHT - BOTTOM + 1]


def of_step(step: float, first: float, last: float) -> float:
    return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """200 points to step 20000, resumed at 12000, with a held-out loss and three checkpoints."""
    steps, values = healthy(200)
    rows = [{"step": int(s), "images": int(s), "train/loss": float(v)} for s, v in zip(steps, values, strict=True)]
    for row in rows[39::40]:
        row["val/loss"] = 1.1 * row["train/loss"]
    rows = rows[:150] + rows[119:]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = (f"2026-01-01 [rank 0] INFO rqvae: checkpoint x/checkpoints/step_{step:08d}\n" for step in SAVED)
    (tmp_path / "log.txt").write_text("".join(saved))
    return tmp_path


def test_moments_stand_at_their_steps(run: Path) -> None:
    linear = as_html(examine(read_log(run))).split("<figure>")[1]
    for kind, steps in (("restart", [12000]), ("checkpoint", SAVED), ("evaluation", range(4000, 20001, 4000))):
        expected = [of_step(step, 100, 20000) for step in steps]
        assert places(linear, kind) == pytest.approx(expected, abs=0.06), kind
        assert f">{kind} ({len(expected)})<" in linear


def test_checkpoints_and_samples_that_a_text_log_names(tmp_path: Path) -> None:
    guided_text(tmp_path / "log.txt", healthy(90))
    tables = (tmp_path / "log.txt").read_text().split("-" * 24 + "\n" + "-" * 24 + "\n")
    tables[50] = tables[50] + "-" * 24 + "\nsaving model 0...\nSampling ...\n" + "-" * 24 + "\n"
    (tmp_path / "log.txt").write_text(("-" * 24 + "\n" + "-" * 24 + "\n").join(tables))
    log = read_log(tmp_path / "log.txt")
    assert log.points("loss") == 90
    linear = as_html(examine(log)).split("<figure>")[1]
    last = log.segments[0].series["loss"].steps
    for kind in ("checkpoint", "evaluation"):
        assert places(linear, kind) == pytest.approx([of_step(5100, last[0], last[-1])], abs=0.06)


def test_what_lies_in_another_run_of_the_file_is_not_shown(tmp_path: Path) -> None:
    dit(tmp_path / "a", healthy(80))
    lines = (tmp_path / "a").read_text().splitlines()
    lines = [*lines[:30], "[2025-01-31 23:59:59] Saved checkpoint to x.pt", *lines[30:], *lines]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    figures = as_html(examine(read_log(tmp_path / "log.txt"))).split("<figure>")[1:]
    shown = [bool(places(figure, "checkpoint")) for figure in figures if "Train Loss</figcaption>" in figure]
    assert shown == [True, False]


def test_many_moments_are_thinned_and_those_outside_left_out() -> None:
    steps = np.arange(1, 101.0)
    series = Series("loss", steps, 1 / steps, steps.astype(np.int64))
    moments = [Moment("evaluation", step) for step in range(-50, 151)]
    picture = curve("loss", [series], "step", moments=moments)
    assert "evaluation (100)" in picture
    assert places(picture, "evaluation") == pytest.approx([of_step(s, 1, 100) for s in range(1, 101, 2)], abs=0.06)


@pytest.mark.slow
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(as_html(examine(read_log(run))))
    with chromium(tmp_path / "profile") as page:
        page.open((tmp_path / "page.html").as_uri())
        page.wait("document.querySelectorAll('svg').length > 1")
        outside = page.run(
            "[...document.querySelectorAll('svg .e, svg .t')].filter(e => { const a = e.getBoundingClientRect(), "
            "b = e.closest('svg').getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 || "
            "a.top < b.top - 1 || a.bottom > b.bottom + 1; }).map(e => e.outerHTML)"
        )
        assert outside == []
        assert page.run("document.querySelectorAll('svg .restart').length") >= 2
        page.run("document.querySelector('.plots').scrollIntoView()")
        page.screenshot(Path(os.environ.get("RQVAE_SCREENSHOTS", tmp_path), "health.png"))
