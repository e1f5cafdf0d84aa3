"""The same examination while a run trains: of the rows that it has written so far, again and again.

A look is a function of the first `rows` lines of metrics.jsonl, the first `words` lines of log.txt and config.yaml, and
notes those numbers, so that it can be repeated when the run is over.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput
from rqvae.health.examine import examine
from rqvae.health.readers.rqvae_log import Reader
from rqvae.health.report_json import as_json
from rqvae.health.settings import read_settings

LOOKS = "health.jsonl"
"""One line a look, in the run's folder."""


@dataclass(frozen=True)
class Look:
    """What was known of a run at a moment.

    Args:
        step: the newest row's.
        rows: lines of metrics.jsonl.
        words: lines of log.txt.
        findings: as `as_json` has them, the most severe first.
    """

    step: float
    rows: int
    words: int
    findings: tuple[dict[str, Any], ...]

    def line(self) -> str:
        """As JSON, without a line end."""
        return json.dumps(asdict(self), allow_nan=False)


def look(run: Path, rows: int | None = None, words: int | None = None) -> Look:
    """Examine a run of ours as it was when it had written so much; None is now.

    Raises:
        BadInput: a folder without a whole row.
    """
    log, text, config = run / "metrics.jsonl", run / "log.txt", run / "config.yaml"
    rows = _whole_lines(log) if rows is None else rows
    words = _whole_lines(text) if words is None else words
    if not rows:
        raise BadInput(f"{log}: expected rows of a run of this package, found none")
    # the end of a run is never part of a look: the last one is taken before it is known
    known = Reader().read_beginning(log, rows, words, finished=False)
    examination = examine(known, read_settings(config) if config.is_file() else ())
    step = max(float(series.steps.max()) for segment in known.segments for series in segment.series.values())
    return Look(step, rows, words, tuple(as_json(examination)["findings"]))


def read_looks(run: Path) -> list[Look]:
    """The looks that were taken while a run trained.

    Raises:
        BadInput: there are none, or the file is not what a run writes.
    """
    path = run / LOOKS
    if not path.is_file():
        raise BadInput(f"{path}: expected what rqvae.callbacks.health.Health writes, there is no such file")
    looks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            looks.append(Look(row["step"], row["rows"], row["words"], tuple(row["findings"])))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}, line {number}: expected a look as JSON, got {line[:60]!r}") from error
    return looks


def news(before: Look | None, now: Look) -> list[dict[str, Any]]:
    """The findings that are new, or more severe than they were."""
    known = {(f["id"], f["severity"]) for f in before.findings} if before else set()
    return [f for f in now.findings if (f["id"], f["severity"]) not in known]


def _whole_lines(path: Path) -> int:
    """Lines that have their end: a row that is being written is none yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
