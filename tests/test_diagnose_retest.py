"""The workflow around a diagnosis: testing again without what is bad, going on after an interruption, crashes in the
searches, and what is written when."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rqvae.commands import diagnose as command
from rqvae.diagnostics.compilers import TorchCompiler
from rqvae.diagnostics.faults import FaultyCompiler
from rqvae.diagnostics.journal import Journal, read_lines
from rqvae.diagnostics.rows import Row
from rqvae.diagnostics.subjects import Request, Subject
from rqvae.diagnostics.units import ROOT
from rqvae.trainers.diagnostic_files import Mirrors
from rqvae.trainers.vae_diagnostic import DiagnosticSettings, VaeDiagnostic
from tests.conftest import finish, start
from tests.diagnoses import backend, metrics, options_of
from tests.diagnoses import small as small_decoder

BAD = "mid_block.resnets.0.norm1"
FEW = f"conv_in,{BAD},mid_block.resnets.0.conv1"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of a diagnosis that takes seconds."""
    return options_of(tmp_path / "out")


def rows_at(folder: Path, key: str) -> dict[str, Row]:
    return {row["path"]: row for row in metrics(folder)["summary"]["compile_except"][key]["results"]}


@pytest.mark.slow
def test_the_retest_stays_beside_the_first_diagnosis(
    cli: Callable[..., int], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that the diagnosis prints, as it stands; then another set, then the first one again."""
    out, fault = tmp_path / "out", ["--backend", backend(f"{BAD}:compile_raise")]
    assert cli("diagnose", *small, *fault, "--test_paths", FEW) == 0
    first = metrics(out)
    printed = " ".join(capsys.readouterr().out.split())
    (given,) = re.findall(r"retest: python -m rqvae diagnose (.*--latent_size 4)", printed)
    assert cli("diagnose", *shlex.split(given)) == 0
    said = capsys.readouterr().out
    assert f"excluded.{BAD}" in said
    whole = metrics(out)
    assert whole["results"] == first["results"]
    assert whole["config"] == first["config"]
    assert {k: v for k, v in whole["summary"].items() if k != "compile_except"} == first["summary"]
    rows = rows_at(out, BAD)
    assert {path: (row["status"], row["role"]) for path, row in rows.items()} == {
        "combined": ("OK", None),
        f"excluded.{BAD}": ("COMPILE_ERROR", "culprit"),
        "interaction": ("COMPILE_ERROR", "inherited"),
    }
    assert rows["combined"]["backend_calls"] >= rows["combined"]["calls"] >= len(rows["combined"]["compiled"]) > 5
    error = rows["interaction"]["error"]
    assert (error["class"], error["path"], error["kind"]) == ("Decoder", "<root>", "RuntimeError")
    assert error["trace"]
    assert "float32 (1, 4, 4, 4)" in error["signature"]
    # another set, all of which is excluded
    assert cli("diagnose", *small, *fault, "--mode", "compile_except", "--exclude_path", "<root>") == 0
    assert rows_at(out, BAD) == rows
    combined = rows_at(out, "<root>")["combined"]
    assert (combined["status"], combined["backend_calls"]) == ("NOT_EXERCISED", 0)
    assert combined["notes"] == ["NOTHING_COMPILED"]
    assert cli("diagnose", *small, *fault, "--mode", "compile_except") == 0
    assert list(metrics(out)["summary"]["compile_except"]) == ["<root>", BAD]
    table = list(csv.DictReader((out / "metrics" / "metrics.csv").open()))
    assert [(line["path"], line["excluded"]) for line in table] == [
        *((path, "") for path in FEW.split(",")),
        *((path, "<root>") for path in ("combined", "excluded.<root>", "interaction")),
        *((path, BAD) for path in rows),
    ]
    page = " ".join(re.sub(r"<[^>]*>", " ", (out / "report.html").read_text()).split())
    assert f"Wrong by themselves {BAD}" in page
    assert f"Excluded: {BAD}." in page


@pytest.mark.slow
def test_pictures_of_two_sets_are_apart(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    fault = ["--backend", backend(f"{BAD}:blank"), "--mode", "compile_except", "--exclude_path"]
    for excluded in (BAD, "conv_in"):
        assert cli("diagnose", *small, *fault, excluded) == 0
    files = [
        row["image"]["file"]
        for entry in metrics(tmp_path / "out")["summary"]["compile_except"].values()
        for row in entry["results"]
        if "file" in row["image"]
    ]
    assert len(files) == len(set(files)) == 5  # of conv_in's set, what holds the fault is bad in all three rows


@pytest.mark.slow
def test_another_subject_starts_anew(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    assert cli("diagnose", *small, "--backend", "eager", "--test_paths", "conv_in") == 0
    other = ["--backend", "eager", "--seed", "1", "--mode", "compile_except", "--exclude_path", "conv_in"]
    assert cli("diagnose", *small, *other) == 0
    whole = metrics(tmp_path / "out")
    assert [row["path"] for row in whole["results"]] == ["combined", "excluded.conv_in", "interaction"]
    assert (whole["config"]["mode"], whole["config"]["seed"]) == ("compile_except", 1)


def test_compile_except_goes_on_after_ctrl_c(
    cli: Callable[..., int],
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*small, "--backend", "eager", "--mode", "compile_except", "--exclude_path", "conv_in"]
    assert cli("diagnose", *options, "--resume") == 2
    assert "--resume: expected" in capsys.readouterr().err
    begun: list[str] = []

    def stop(_: object, path: str, done: int, total: int) -> None:
        begun.append(path)
        if path == "interaction":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command._Bar, "show", stop)
        assert cli("diagnose", *options) == 130
    journal = tmp_path / "out" / "journal.jsonl"
    known = [line["row"]["path"] for line in read_lines(journal) if "row" in line]
    assert known == ["combined", "excluded.conv_in"]
    begun.clear()
    monkeypatch.setattr(command._Bar, "show", lambda _, path, *numbers: begun.append(path))
    assert cli("diagnose", *options, "--resume") == 0
    assert begun == ["interaction"]
    assert [row["status"] for row in metrics(tmp_path / "out")["results"]] == ["OK"] * 3


class Fatal(FaultyCompiler):
    """Each module's code is right by itself; that of the second ends the process where that of the first ran just once
    before it, as in a decode with both. The shadow decode runs new code twice. So does that of the whole decoder."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(inner="eager")
        self._pair, self._ran = (first, second), 0

    def graph_compiler(self, path: str) -> Any:
        return self._made.setdefault(path, lambda graph, _: lambda *given: self._run(path, graph, given))

    def _run(self, path: str, graph: Any, given: Any) -> Any:
        if path == ROOT or (path == self._pair[1] and self._ran == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        self._ran = self._ran + 1 if path == self._pair[0] else 0
        return graph.forward(*given)


@pytest.mark.slow
def test_a_crash_in_the_search_and_in_the_plan_leaves_metrics(small: list[str], tmp_path: Path) -> None:
    pair = {"first": BAD, "second": "mid_block.resnets.0.norm2"}
    compiler = json.dumps({"class_path": "tests.test_diagnose_retest.Fatal", "init_args": pair})
    isolated = ["--isolate", "process", "--timeout", "60", "--test_paths", ",".join(pair.values())]
    code, errors = finish(start("diagnose", *small, "--backend", compiler, *isolated), 250)
    assert code == 0, errors
    whole = metrics(tmp_path / "out")
    assert [row["status"] for row in whole["results"]] == ["OK", "OK"]
    assert whole["summary"]["not_searched"] == {"interactions": "CRASHED", "plan": "CRASHED"}
    assert whole["summary"]["plan"]["status"] == "CRASHED"
    assert "interactions not searched: CRASHED" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_crash_in_compile_except_is_a_row(small: list[str], tmp_path: Path) -> None:
    crash = ["--backend", backend(f"{BAD}:crash"), "--mode", "compile_except", "--exclude_path", BAD]
    code, errors = finish(start("diagnose", *small, *crash, "--isolate", "process", "--timeout", "60"), 250)
    assert code == 0, errors
    rows = {row["path"]: row["status"] for row in metrics(tmp_path / "out")["results"]}
    assert rows == {"combined": "OK", f"excluded.{BAD}": "CRASHED", "interaction": "CRASHED"}


def test_a_unit_is_mirrored_before_the_next_one_begins(
    cli: Callable[..., int], small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad one too, whose picture comes later."""
    seen: list[tuple[str, str]] = []
    begin, row = Journal.begin, Mirrors.row
    monkeypatch.setattr(Journal, "begin", lambda self, path: (seen.append(("begin", path)), begin(self, path))[1])
    monkeypatch.setattr(Mirrors, "row", lambda self, r: (seen.append(("row", r["path"])), row(self, r))[1])
    fault = ["--backend", backend(f"{BAD}:blank"), "--test_paths", FEW, "--save_images"]
    assert cli("diagnose", *small, *fault, "--use_tensorboard") == 0
    expected = [(what, path) for path in FEW.split(",") for what in ("begin", "row")]
    assert seen[: len(expected)] == expected


def test_what_has_no_picture_says_why(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    paths = "mid_block.resnets.0.dropout,mid_block.resnets,conv_in"
    fault = ["--backend", backend("conv_in:runtime_raise"), "--test_paths", paths]
    assert cli("diagnose", *small, *fault) == 0
    rows = {row["path"]: row for row in metrics(tmp_path / "out")["results"]}
    assert rows["conv_in"]["image"]["no_picture"] == "the decode raised RuntimeError"
    for row in rows.values():
        assert row["status"] == "OK" or "file" in row["image"] or row["image"]["no_picture"]
    assert rows["mid_block.resnets"]["image"]["no_picture"] == "it only holds modules"
    assert "the decode raised RuntimeError" in (tmp_path / "out" / "report.html").read_text()


class Overflowing:
    """A decoder in fp16 one of whose last convolutions overflows."""

    def subject(self, request: Request, latent: Tensor | None = None) -> Subject:  # noqa: ARG002
        subject = small_decoder(torch.float16)
        subject.root.get_submodule("up_blocks.1.resnets.1.conv2").weight.mul_(1e7)  # type: ignore[operator, union-attr]
        return subject


def test_after_overflow_the_plan_and_the_pictures_say_so_too(tmp_path: Path) -> None:
    paths = "conv_in,up_blocks.1.resnets.1.conv2,conv_out"
    settings = DiagnosticSettings(tmp_path, test_paths=paths, compiler="eager")
    whole = VaeDiagnostic(Overflowing(), Request(), TorchCompiler("eager"), settings).execute()
    rows, summary = {row["path"]: row for row in whole["results"]}, whole["summary"]
    assert [(row["status"], row["role"]) for row in rows.values()] == [
        ("OK", None),
        ("EAGER_NONFINITE", "culprit"),
        ("EAGER_NONFINITE", "inherited"),
    ]
    for path in ("up_blocks.1.resnets.1.conv2", "conv_out"):
        image = rows[path]["image"]
        assert (image["status"], image["mean"]) == ("EAGER_NONFINITE", "nan")
        with Image.open(tmp_path / image["error_map"]) as error_map:
            assert error_map.getextrema() == ((255, 255),) * 3, "no pixel of it is a finite number"
    assert summary["not_searched"] == {"interactions": "EAGER_NONFINITE, the eager image is not finite"}
    assert (summary["plan"]["status"], summary["interactions"]) == ("EAGER_NONFINITE", [])
    assert metrics(tmp_path)["config"]["reference"]["mean"] == "nan"


def test_an_image_that_is_not_finite_is_written(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    """JSON has no NaN."""
    assert cli("diagnose", *small, "--backend", backend("conv_in:nan"), "--test_paths", "conv_in") == 0
    (row,) = metrics(tmp_path / "out")["results"]
    assert (row["status"], row["image"]["mean"], row["image"]["status"]) == ("NONFINITE", "nan", "NONFINITE")


def test_random_weights_are_said_in_every_output(cli: Callable[..., int], small: list[str], tmp_path: Path) -> None:
    fault = ["--backend", backend(f"{BAD}:blank"), "--test_paths", FEW, "--use_tensorboard"]
    assert cli("diagnose", *small, *fault) == 0
    out = tmp_path / "out"
    for name in (
        *("submodules/submodule_list.txt", "journal.jsonl", "bad_paths.txt", "compile_plan.yaml", "report.html"),
        *("metrics/metrics.json", "metrics/metrics.csv"),
    ):
        assert "RANDOM WEIGHTS" in (out / name).read_text(), name
    (events,) = (out / "logs" / "tensorboard").iterdir()
    assert b"RANDOM WEIGHTS" in events.read_bytes()
