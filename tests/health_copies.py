"""Copies of a log that say the same: other steps, another unit of the loss, fewer points, other formats."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rqvae.health.log import Fact, LogBuilder, RunLog, Series
from rqvae.health.roles import role_of
from rqvae.health.settings import NAMES, Setting

SHIFT, WORTH_THINNING = 37, 8
_TOTALS = {name.lower().replace(" ", "_") for name in (*NAMES["steps"], "global_step")}
LOSSES = {"train_loss", "eval_loss", "ema_eval", "t_bin", "class_loss", "mask_right", "mask_shuffled"}


def _scaled(series: Series, factor: float) -> Series:
    values = series.values * factor if role_of(series.name) in LOSSES else series.values
    return Series(series.name, series.steps, values, series.lines)


def _thinned(series: Series, first: int) -> Series:
    return series.pick(np.arange(first, len(series), 2)) if len(series) >= WORTH_THINNING else series


CHANGES: dict[str, Callable[[Series], Series]] = {
    "shifted": lambda s: Series(s.name, s.steps + SHIFT, s.values, s.lines),
    "a tenth of the loss": lambda s: _scaled(s, 0.1),
    "three times the loss": lambda s: _scaled(s, 3.0),
    "even points": lambda s: _thinned(s, 0),
    "odd points": lambda s: _thinned(s, 1),
}


def changed(log: RunLog, name: str) -> RunLog:
    """The log as its reader would have built it from other points, with the totals that it states shifted as they."""
    change = CHANGES[name]
    copy = LogBuilder(log.path, log.format, log.trust, log.unit)
    for segment in log.segments:
        copy.begin_run(segment.label)
        for series in map(change, segment.series.values()):
            for step, value, line in zip(series.steps, series.values, series.lines, strict=True):
                copy.add(series.name, float(step), float(value), int(line))
    copy.events, copy.notes = list(log.events), list(log.notes)
    copy.facts = [_shifted(fact) if name == "shifted" else fact for fact in log.facts]
    copy.counts.update(log.counts)
    return copy.finish(log.lines)


def _shifted(fact: Fact) -> Fact:
    total = fact.key.lower().replace(" ", "_") in _TOTALS
    return replace(fact, value=f"{float(fact.value) + SHIFT:g}") if total else fact


def _all_series(log: RunLog) -> dict[str, Series]:
    """Those of the only run, and the epoch of each point where lines of their own say it."""
    (segment,) = log.segments
    series, begun = dict(segment.series), log.of_kind("epoch")
    if begun and series:
        most = max(series.values(), key=len)
        behind = np.searchsorted([event.line for event in begun], most.lines)
        epochs = np.array([np.nan, *(float(event.text) + 1 for event in begun)])[behind]
        series["epoch"] = Series("epoch", most.steps, epochs, most.lines)
    return series


def _rows(log: RunLog) -> list[dict[str, float]]:
    """One row a step; a value that comes again at a step is in a row of its own."""
    rows: dict[tuple[float, int], dict[str, float]] = {}
    for name, series in _all_series(log).items():
        seen: Counter[float] = Counter()
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            rows.setdefault((step, seen[step]), {"step": step})[name] = value
            seen[step] += 1
    return [rows[key] for key in sorted(rows)]


def as_jsonl(folder: Path, log: RunLog) -> Path:
    """metrics.jsonl of a run of this package, with FINISHED where the log has an end."""
    rows = [{("time" if key == "wall_time" else key): value for key, value in row.items()} for row in _rows(log)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "images": 8 * row["step"]}) + "\n" for row in rows)
    )
    if log.of_kind("done"):
        (folder / "FINISHED").touch()
    return folder / "metrics.jsonl"


def as_table(folder: Path, log: RunLog) -> Path:
    """metrics.csv of Lightning."""
    with (folder / "metrics.csv").open("w", newline="") as file:
        names = ["step", *dict.fromkeys(["epoch", *_all_series(log)])]
        table = csv.DictWriter(file, names, restval="")
        table.writeheader()
        table.writerows(_rows(log))
    return folder / "metrics.csv"


FORMATS: dict[str, Callable[[Path, RunLog], Path]] = {"rqvae": as_jsonl, "lightning-csv": as_table}


def settings_of(log: RunLog) -> tuple[Setting, ...]:
    """What the log states, as a config beside a copy that cannot state it."""
    return tuple(Setting(fact.key, fact.value, "config.yaml", fact.line) for fact in log.facts)
