"""Reading metrics.jsonl, a run's log of record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.errors import BadInput


@dataclass(frozen=True)
class Metrics:
    """The rows of a run.

    Args:
        name: of the run, for legends.
        rows: one dict a row: `step`, `images`, `epoch`, `time`, and values by slash names such as `train/loss_total`.
    """

    name: str
    rows: list[dict[str, Any]]

    @property
    def keys(self) -> list[str]:
        """Names of the values, in the order in which they first occur."""
        return list(dict.fromkeys(key for row in self.rows for key in row if "/" in key))

    def series(self, key: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """The rows that have `key`: (n,) of `against` and (n,) of values, NaN where a value was not finite.

        `time` is logged by the clock on the wall and given here in seconds from the first row on.
        """
        found = [(row[against], row[key]) for row in self.rows if key in row]
        pairs = np.array([(x, np.nan if y is None else y) for x, y in found], dtype=np.float64).reshape(-1, 2)
        start = self.rows[0]["time"] if against == "time" else 0
        return pairs[:, 0] - start, pairs[:, 1]

    @property
    def seconds(self) -> float:
        """From the first row to the last, pauses of a run that was taken up again included."""
        return self.rows[-1]["time"] - self.rows[0]["time"]


def read_metrics(path: Path, name: str) -> Metrics:
    """Read a metrics.jsonl, also that of a run that is still writing: a last line without its end is left out.

    Raises:
        BadInput: no such file, no whole row, or a line before the last that is not a JSON object with a `step`.
    """
    if not path.is_file():
        raise BadInput(f"{path}: expected the metrics of a run, there is no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise BadInput(f"{path}: line {number}: expected a JSON object with a step, got {line[:60]!r}")
    if not rows:
        raise BadInput(f"{path}: expected at least one row, got none")
    return Metrics(name, rows)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
