"""`python -m rqvae health`: exit codes, what it writes, what it does not import, and how long it takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rqvae.health.readers import read_log
from tests.health_logs import dit, healthy, ours, wandb_csv


def sick(path: Path) -> Path:
    steps, values = healthy(300)
    values[240:] = 1.0 + 0.01 * np.sin(np.arange(60))
    dit(path, (steps, values))
    return path


def test_exit_codes(cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit(tmp_path / "well.txt", healthy(300))
    assert cli("health", tmp_path / "well.txt") == 0
    assert cli("health", tmp_path / "well.txt", "--fail-on", "info") == 1
    assert cli("health", sick(tmp_path / "sick.txt")) == 1
    shown = capsys.readouterr().out
    assert "Stop: 2 critical" in shown
    assert "sick.txt:" in shown
    assert "first: " in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["none.txt"],
        ["well.txt", "--config", "none.yaml"],
        ["well.txt", "--source", "none"],
        ["well.txt", "--baseline", "none.txt"],
        ["well.txt", "--format", "wandb-csv"],
        ["well.txt", "--html", "."],
        ["well.txt", "--fail-on", "huge"],
        ["empty"],
    ],
)
def test_bad_input_is_one_line(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    dit(tmp_path / "well.txt", healthy(60))
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / a) if not a.startswith("-") and a not in ("wandb-csv", "huge") else a for a in arguments]
    assert cli("health", *paths) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_json_says_what_why_and_where(cli: Callable[..., int], tmp_path: Path) -> None:
    cli("health", sick(tmp_path / "log.txt"), "--json", tmp_path / "deep" / "out.json")
    told = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert {"findings", "not_assessed", "assessed", "inventory"} <= set(told)
    first = told["findings"][0]
    keys = {"id", "severity", "confidence", "message", "evidence", "power", "alternatives", "recommendation", "verify"}
    assert keys <= set(first)
    assert first["severity"] == "critical"
    lines = (tmp_path / "log.txt").read_text().split("\n")
    for evidence in first["evidence"]:
        if evidence["line"]:
            assert evidence["text"].split("Train Loss: ")[1][:6] in lines[evidence["line"] - 1]
    assert told["inventory"]["parameters"] == {"value": "32,956,704", "place": "log.txt:2"}
    assert told["inventory"]["optimizer"]["value"] == "not stated"
    count = len(told["assessed"]) + len(told["not_assessed"]) + len({f["id"] for f in told["findings"]})
    from rqvae.health.checks import all_checks

    assert count == len(all_checks())


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "br", "line", "rect", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle", "path"):
            assert self.open.pop() == tag


def test_the_page_is_one_small_file_with_annotated_curves(cli: Callable[..., int], tmp_path: Path) -> None:
    cli("health", sick(tmp_path / "log.txt"), "--html", tmp_path / "out.html", "--md", tmp_path / "out.md")
    page = (tmp_path / "out.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not tags.links
    assert "script" not in tags.seen
    assert len(page) < 500_000
    assert tags.seen.count("svg") >= 3
    assert "logarithmic" in page
    assert 'class="m critical"' in page
    words = (tmp_path / "out.md").read_text()
    order = [words.index(f"## {title}") for title in ("What to do first", "Inventory", "Findings", "Not assessed")]
    assert order == sorted(order)
    assert page.index("What to do first") < page.index("Inventory") < page.index("Findings")


def test_a_name_from_a_log_is_no_markup(cli: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("loss,<script>alert(1)</script>,samples,step\n0.5,1,8,1\n0.4,1,16,2\n")
    cli("health", tmp_path / "progress.csv", "--html", tmp_path / "out.html")
    assert "<script>" not in (tmp_path / "out.html").read_text()


def test_the_folder_of_a_run_of_ours(cli: Callable[..., int], tmp_path: Path) -> None:
    ours(tmp_path / "metrics.jsonl", healthy(300))
    (tmp_path / "config.yaml").write_text("train:\n  steps: 99999\ndata:\n  batch_size: 8\n")
    (tmp_path / "log.txt").write_text(
        "2026 [rank 0] INFO rqvae.trainers.assembly: stage2 DiT: 1,271,812 parameters, 5 trainable\n"
    )
    assert cli("health", tmp_path, "--json", tmp_path / "out.json") == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert {f["id"] for f in told["findings"]} == {
        "EVAL.MISSING",
        "LOG.MISSING_GRAD",
        "LOG.MISSING_LR",
        "LOG.MISSING_T_BINS",
        "RUN.TRUNCATED",
    }
    assert told["inventory"]["steps"]["place"] == "config.yaml:2"


def test_a_baseline_is_compared_with(cli: Callable[..., int], tmp_path: Path) -> None:
    steps, values = healthy(300)
    dit(tmp_path / "good", (steps, values))
    dit(tmp_path / "worse", (steps, 1.5 * values))
    cli("health", tmp_path / "worse", "--baseline", tmp_path / "good", "--json", tmp_path / "o.json")
    assert "LOSS.BASELINE_WORSE" in (tmp_path / "o.json").read_text().split('"not_assessed"')[0]


def test_it_imports_no_torch_and_answers_quickly(tmp_path: Path) -> None:
    steps, values = healthy(22000, every=1)
    dit(tmp_path / "log.txt", (steps, values))
    assert (tmp_path / "log.txt").stat().st_size > 1_600_000
    code = (
        "import sys; from rqvae.cli import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'matplotlib', 'pandas', 'scipy', 'PIL', 'jinja2', 'jsonargparse'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    started = time.monotonic()
    arguments = [
        "health",
        str(tmp_path / "log.txt"),
        "--html",
        str(tmp_path / "o.html"),
        "--json",
        str(tmp_path / "o.json"),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert min(time.monotonic() - started, spent) < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("write", [dit, wandb_csv])
def test_a_hundred_megabytes_in_bounded_memory(tmp_path: Path, write: Callable[..., None]) -> None:
    points = 1_200_000 if write is dit else 1_700_000
    write(tmp_path / "log", healthy(points, every=1))
    assert (tmp_path / "log").stat().st_size > 100_000_000
    # ru_maxrss of a child begins with its parent's; VmHWM does not.
    code = "import sys; from rqvae.cli import run; run(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "health", str(tmp_path / "log")], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert int(done.stdout.splitlines()[-1]) < 600_000  # kB


def test_evidence_of_a_table_is_its_row(tmp_path: Path) -> None:
    wandb_csv(tmp_path / "x.csv", healthy(30))
    series = read_log(tmp_path / "x.csv").segments[0].series["train_loss"]
    row = (tmp_path / "x.csv").read_text().split("\n")[series.lines[7] - 1]
    assert str(series.values[7]) in row
