"""A profile of some steps: trace, operators, memory. `--profile START:STOP` asks for it; without it nothing is done."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Observer, RunView

log = logging.getLogger(__name__)

OPERATORS = 60
"""Rows of the tables."""


class Profiler(Observer):
    """Records the steps START to STOP (the first step of a run is 0, STOP is not included) under `RUN/profile/`.

    Every rank writes its own files: `trace_rank0.json` for chrome://tracing or ui.perfetto.dev, with a span a step
    that includes the wait for its data; `operators_rank0.txt` and `memory_rank0.txt`, the operators by their own time
    and by the memory that they themselves took; `memory_rank0.csv`, what was allocated after every allocation and
    free of the window; and `memory_rank0.pickle`, a snapshot for pytorch.org/memory_viz, on devices that keep one.

    A run that goes on within the window records the rest of it; one that goes on after it, or that ends within it,
    says so in the log. While it records, a run is slower than its own log says of other steps.

    Args:
        start: first step recorded.
        stop: first step after that is not.
        backend: this rank.
    """

    def __init__(self, start: int, stop: int, backend: Backend) -> None:
        self.start, self.stop, self.backend = start, stop, backend
        self._profile: torch.profiler.profile | None = None
        self._span: torch.profiler.record_function | None = None

    def on_fit_start(self, run: RunView) -> None:
        if run.clock.step >= self.stop:
            log.warning("profile: steps %d to %d are over at step %d", self.start, self.stop, run.clock.step)
        elif run.clock.step >= self.start:
            self._begin(run)

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        step = run.clock.step
        if self._profile is not None:
            self._end_step()
            if step >= self.stop:
                self._write(run)
            else:
                self._begin_step(step)
        elif step == self.start:
            self._begin(run)

    def on_fit_end(self, run: RunView) -> None:
        if self._profile is not None:
            log.warning("profile: the run ended at step %d, within the window", run.clock.step)
            self._end_step()
            self._write(run)

    def _begin(self, run: RunView) -> None:
        self.backend.record_memory()
        self._profile = torch.profiler.profile(
            activities=self.backend.profiler_activities(), record_shapes=True, profile_memory=True
        )
        self._profile.start()
        self._begin_step(run.clock.step)

    def _begin_step(self, step: int) -> None:
        self._span = torch.profiler.record_function(f"step {step}")
        self._span.__enter__()

    def _end_step(self) -> None:
        assert self._span is not None
        self._span.__exit__(None, None, None)

    def _write(self, run: RunView) -> None:
        assert self._profile is not None
        profile, self._profile = self._profile, None
        profile.stop()
        folder, rank = run.folder / "profile", f"rank{self.backend.rank}"
        folder.mkdir(exist_ok=True)
        self.backend.write_memory(folder / f"memory_{rank}.pickle")
        trace = folder / f"trace_{rank}.json"
        profile.export_chrome_trace(str(trace))
        averages = profile.key_averages()
        side = "device" if any(event.self_device_time_total for event in averages) else "cpu"
        by_time = averages.table(sort_by=f"self_{side}_time_total", row_limit=OPERATORS)
        by_memory = averages.table(sort_by=f"self_{side}_memory_usage", row_limit=OPERATORS)
        (folder / f"operators_{rank}.txt").write_text(by_time)
        peak = write_memory_timeline(trace, folder / f"memory_{rank}.csv")
        lines = [f"peak of {name}: {amount:,} bytes above the window's start\n" for name, amount in peak.items()]
        (folder / f"memory_{rank}.txt").write_text("".join(lines) + by_memory)
        log.info("profile of steps %d to %d: %s", self.start, run.clock.step, folder)


def write_memory_timeline(trace: Path, out_csv: Path) -> dict[str, int]:
    """Write what was allocated when, from the memory events of a chrome trace of `torch.profiler`.

    Columns: microseconds since the first event, device, bytes allocated above the window's start.

    Args:
        trace: JSON with instant events `[memory]`, each with its bytes (negative for a free) and its device.
        out_csv: file to write.

    Returns:
        The peak of each device, in bytes above the window's start.
    """
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    allocated: dict[str, int] = {}
    peak: dict[str, int] = {}
    lines = ["microseconds,device,bytes"]
    for event in events:
        kind, index = event["args"]["Device Type"], event["args"]["Device Id"]
        device = "host" if kind == 0 else f"device {index}"
        # not "Total Allocated": the host's counts from the first profile of the process
        allocated[device] = allocated.get(device, 0) + event["args"]["Bytes"]
        peak[device] = max(peak.get(device, 0), allocated[device])
        lines.append(f"{event['ts'] - events[0]['ts']:.3f},{device},{allocated[device]}")
    out_csv.write_text("\n".join(lines) + "\n")
    return peak
