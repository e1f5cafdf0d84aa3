"""`--profile START:STOP`: what it records is what was done, and it changes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from rqvae import backends
from rqvae.callbacks.profiler import Profiler, write_memory_timeline
from rqvae.configuration import read
from rqvae.trainers.run_folder import same_config
from tests.conftest import assert_same, only, tensors

QUICK = ["--pictures.every", "null", "--online_eval.every", "null", "--checkpoint.every", 6, "--train.steps", 6]


def test_a_window_is_recorded_and_leaves_no_trace_in_the_weights(tmp_path: Path, cli) -> None:
    line = ["train", "configs/debug/stage2.yaml", "--project", "p", "--run-name", "r", *QUICK]
    assert cli(*line, "--save-dir", tmp_path / "with", "--profile", "2:4") == 0
    assert cli(*line, "--save-dir", tmp_path / "without") == 0
    watched, plain = (only(tmp_path / which / "p") for which in ("with", "without"))
    assert_same(tensors(watched, 6), tensors(plain, 6))
    assert not (plain / "profile").exists()

    found = {path.name for path in (watched / "profile").iterdir()}
    assert found == {f"{kind}_rank0.{end}" for kind, end in FILES}
    events = json.loads((watched / "profile" / "trace_rank0.json").read_text())["traceEvents"]
    spans = sorted({event["name"] for event in events if event["name"].startswith("step ")})
    assert spans == ["step 2", "step 3"]
    optimizer = [event for event in events if event["name"].startswith("Optimizer.step")]
    assert len(optimizer) == 2, "one generator, two steps"
    assert "aten::addmm" in (watched / "profile" / "operators_rank0.txt").read_text()
    # the window's own folder, not a key of what is computed: the same command with a window goes on with the run
    assert same_config(plain, read(["configs/debug/stage2.yaml"], [str(x) for x in QUICK]).resolved)
    assert yaml.safe_load((watched / "config.yaml").read_text())["profile"] == "2:4"
    config = {**yaml.safe_load((plain / "config.yaml").read_text()), "profile": "2:4"}
    assert same_config(plain, config)


FILES = (("trace", "json"), ("operators", "txt"), ("memory", "txt"), ("memory", "csv"))


def test_memory_timeline_is_what_was_allocated(tmp_path: Path) -> None:
    mebi = 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        a = torch.empty(3 * mebi, dtype=torch.uint8)
        b = torch.empty(mebi, dtype=torch.uint8)
        del a
        c = torch.empty(2 * mebi, dtype=torch.uint8)
        del b, c
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    peak = write_memory_timeline(tmp_path / "trace.json", tmp_path / "memory.csv")
    with (tmp_path / "memory.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["bytes"]) / mebi for row in table] == [3, 4, 1, 3, 2, 0]
    times = [float(row["microseconds"]) for row in table]
    assert times[0] == 0
    assert times == sorted(times)
    assert peak == {"host": 4 * mebi}


@pytest.mark.parametrize(
    ("window", "got"),
    [
        ("4:2", "START < STOP such as 10:13, got '4:2'"),
        ("4:4", "got '4:4'"),
        ("4", "got '4'"),
        ("first", "got 'first'"),
        ("-1:3", "got '-1:3'"),
        ("5:7", "within the run's 6 steps, got 5:7"),
    ],
)
def test_a_window_that_is_none_is_refused(window: str, got: str, tmp_path: Path, cli, capfd) -> None:
    line = ["train", "configs/debug/stage2.yaml", "--save-dir", tmp_path, "--project", "p", *QUICK]
    assert cli(*line, f"--profile={window}") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("error: profile: expected START:STOP")
    assert message.endswith(got)
    assert not list(tmp_path.iterdir())


def test_a_window_in_a_file_without_quotes_is_said(tmp_path: Path, cli, capfd) -> None:
    """YAML reads 5:8 as a number to the base of 60."""
    (tmp_path / "c.yaml").write_text("profile: 5:8\n")
    assert cli("train", "configs/debug/stage2.yaml", tmp_path / "c.yaml", "--save-dir", tmp_path / "s") == 2
    assert "profile" in capfd.readouterr().err.splitlines()[-1]
    (tmp_path / "c.yaml").write_text("profile: '5:8'\n")
    assert read(["configs/debug/stage2.yaml", tmp_path / "c.yaml"]).resolved["profile"] == "5:8"


class Keeping:
    """A rank of a device that keeps a history of its memory."""

    rank = 3

    def profiler_activities(self) -> list[torch.profiler.ProfilerActivity]:
        return [torch.profiler.ProfilerActivity.CPU]

    def record_memory(self) -> None:
        self.recording = True

    def write_memory(self, path: Path) -> bool:
        assert self.recording
        path.write_bytes(b"snapshot")
        return True


@pytest.mark.parametrize(
    ("first", "last", "spans"),
    [(0, 9, ["step 5", "step 6"]), (6, 9, ["step 6"]), (0, 6, ["step 5", "step 6"]), (7, 9, None), (0, 4, None)],
    # a step that was cut off has a span, too
    ids=["whole", "resumed within", "stopped within", "resumed after", "stopped before"],
)
def test_a_run_that_is_cut_off_records_what_it_did(first: int, last: int, spans: Any, tmp_path: Path, caplog) -> None:
    profiler = Profiler(5, 7, Keeping())  # type: ignore[arg-type]
    run: Any = SimpleNamespace(clock=SimpleNamespace(step=first), folder=tmp_path, is_main=True)
    profiler.on_fit_start(run)
    while run.clock.step < last:
        torch.ones(8).sum()
        run.clock.step += 1
        profiler.after_step(run, {})
    profiler.on_fit_end(run)
    folder = tmp_path / "profile"
    assert folder.exists() == (spans is not None)
    if spans is not None:
        assert {path.name for path in folder.iterdir()} == {
            *(f"{kind}_rank3.{end}" for kind, end in FILES),
            "memory_rank3.pickle",
        }
        events = json.loads((folder / "trace_rank3.json").read_text())["traceEvents"]
        assert sorted({event["name"] for event in events if event["name"].startswith("step ")}) == spans
    assert ("are over" in caplog.text) == (first == 7)
    assert ("within the window" in caplog.text) == (last == 6)


def test_a_backend_says_what_it_is() -> None:
    backend = backends.create("cpu")
    assert backend.device_name
    assert backend.profiler_activities() == [torch.profiler.ProfilerActivity.CPU]
    backend.record_memory()
    assert not backend.write_memory(Path("/nowhere/memory.pickle"))
