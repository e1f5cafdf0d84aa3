"""What a log says, whatever its format: series of points, events and facts, each with the line where it stands."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FRESH_START = 0.02
"""A step that falls back to within this share of what was done is a new run; further up it is a resumed one."""
KEPT_EVENTS = 2000
"""Events of one kind that are kept with their text; more are only counted, so that memory stays bounded."""


@dataclass(frozen=True)
class Series:
    """One metric of one run, in the order of the file.

    Args:
        name: as the file spells it.
        steps: (n,) float64; optimizer steps, or what the log counts in (see `RunLog.unit`).
        values: (n,) float64, NaN and Inf kept.
        lines: (n,) int64, 1-based line (or record) of each point.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def pick(self, chosen: np.ndarray) -> Series:
        """The points at these indices, or where this mask (n,) is true."""
        return Series(self.name, self.steps[chosen], self.values[chosen], self.lines[chosen])

    @property
    def finite(self) -> Series:
        """Without NaN and Inf."""
        return self.pick(np.isfinite(self.values))

    @property
    def standing(self) -> Series:
        """Without the points that a resumed run wrote again: those at or after the step that a later restart went to.

        Equal steps without a restart stay: some logs round them.
        """
        if len(self) < 2:
            return self
        restarts = np.append(np.where(np.diff(self.steps) < 0, self.steps[1:], np.inf), np.inf)
        later = np.minimum.accumulate(restarts[::-1])[::-1]
        keep = self.steps < later
        return self if keep.all() else self.pick(keep)


@dataclass(frozen=True)
class Event:
    """Something that happened: `kind` is warning, restart, checkpoint, sampling, epoch, start, done or error."""

    kind: str
    line: int
    text: str
    step: float | None = None


@dataclass(frozen=True)
class Fact:
    """A statement about the run, `key` as it is spelt, with its place."""

    key: str
    value: str
    line: int
    file: str


@dataclass(frozen=True)
class Segment:
    """One run of a file that may hold several: `label` is its name, "" where there is only one."""

    label: str
    series: Mapping[str, Series]


@dataclass(frozen=True)
class RunLog:
    """A whole log.

    Args:
        path: the file.
        format: name of the reader.
        trust: 0 to 1, how sure the reader is of what it read; 0.4 for the generic one.
        segments: the runs in the file, at least one.
        events: in the order of the file, at most `KEPT_EVENTS` a kind.
        counts: of all events, by kind.
        facts: in the order of the file.
        unit: what `steps` counts: step, kimg, epoch or row.
        lines: lines in the file.
        size: bytes.
        notes: what the reader had to work around.
    """

    path: Path
    format: str
    trust: float
    segments: tuple[Segment, ...]
    events: tuple[Event, ...]
    counts: Mapping[str, int]
    facts: tuple[Fact, ...]
    unit: str
    lines: int
    size: int
    notes: tuple[str, ...]

    def points(self, name: str) -> int:
        """Points of a series over all runs in the file."""
        return sum(len(segment.series[name]) for segment in self.segments if name in segment.series)

    def of_kind(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event.kind == kind]


class _Column:
    """A growing series: 24 bytes a point."""

    def __init__(self) -> None:
        self.steps, self.values, self.lines = array("d"), array("d"), array("q")

    def add(self, step: float, value: float, line: int) -> None:
        self.steps.append(step)
        self.values.append(value)
        self.lines.append(line)


@dataclass
class LogBuilder:
    """What a reader fills; `finish` gives the log.

    Args:
        path: of the file.
        format: name of the reader.
        trust: 0 to 1.
        unit: what steps count.
    """

    path: Path
    format: str
    trust: float = 1.0
    unit: str = "step"
    notes: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _placeless: bool = False
    _runs: list[tuple[str, dict[str, _Column]]] = field(default_factory=lambda: [("", {})])

    def add(self, name: str, step: float, value: float, line: int) -> None:
        """One point. A step that falls back far enough opens a new run; less far, it is an event `restart`.

        A step that is not finite has no place, and its point is left out.
        """
        if not math.isfinite(step):
            if not self._placeless:
                self.notes.append(f"line {line}: its step is not finite; points without a step are left out")
            self._placeless = True
            return
        columns = self._runs[-1][1]
        column = columns.get(name)
        if column is None:
            column = columns[name] = _Column()
        elif step < column.steps[-1]:
            first, last = column.steps[0], column.steps[-1]
            if step <= first + FRESH_START * (last - first):
                self.begin_run(f"run from line {line}")
                column = self._runs[-1][1].setdefault(name, _Column())
            else:
                self.event("restart", line, f"step {last:g} is followed by step {step:g}", step)
        column.add(step, value, line)

    def row(self, step: float, values: Mapping[str, float], line: int) -> None:
        """Several points of one step."""
        for name, value in values.items():
            self.add(name, step, value, line)

    def begin_run(self, label: str) -> None:
        """All that follows belongs to another run."""
        if not self._runs[-1][1]:
            self._runs[-1] = (label, {})
        else:
            self._runs.append((label, {}))

    @property
    def last_step(self) -> float | None:
        """The newest step of the current run."""
        return max((column.steps[-1] for column in self._runs[-1][1].values()), default=None)

    def last_step_of(self, name: str) -> float:
        """The newest step of one series of the current run, -inf before its first."""
        column = self._runs[-1][1].get(name)
        return column.steps[-1] if column else float("-inf")

    def event(self, kind: str, line: int, text: str, step: float | None = None) -> None:
        """Something happened."""
        self.counts[kind] += 1
        if self.counts[kind] <= KEPT_EVENTS:
            self.events.append(Event(kind, line, text[:300], step if step is not None else self.last_step))

    def fact(self, key: str, value: object, line: int) -> None:
        """The log states something."""
        if len(self.facts) < KEPT_EVENTS:
            self.facts.append(Fact(key.strip(), str(value).strip()[:2000], line, self.path.name))

    def finish(self, lines: int) -> RunLog:
        """The log, with arrays in place of growing columns."""
        segments = tuple(Segment(label, _series(columns.items())) for label, columns in self._runs)
        size = self.path.stat().st_size
        whole = (tuple(self.events), dict(self.counts), tuple(self.facts))
        return RunLog(self.path, self.format, self.trust, segments, *whole, self.unit, lines, size, tuple(self.notes))


def _series(columns: Iterable[tuple[str, _Column]]) -> dict[str, Series]:
    return {
        name: Series(name, np.array(c.steps), np.array(c.values), np.array(c.lines, dtype=np.int64))
        for name, c in columns
    }
