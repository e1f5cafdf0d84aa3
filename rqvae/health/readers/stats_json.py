"""stats.jsonl of EDM, EDM2 and StyleGAN2/3: `{"Loss/loss": {"num": 512, "mean": 0.3, "std": 0.1}, "timestamp": 1.6e9}`.

The step is `Progress/kimg`: thousands of images (github.com/NVlabs/edm, training/training_loop.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._json_lines import first_object, objects
from rqvae.health.text import as_number


class Reader:
    """A metric is the mean of its interval; an interval without samples (num 0) is left out."""

    name = "stats-jsonl"
    files = ("stats.jsonl", "metric-*.jsonl")

    def sniff(self, _path: Path, head: str) -> float:
        row = first_object(head)
        if any(key.startswith(("Progress/", "Loss/")) for key in row):
            return 0.98
        return 0.97 if "results" in row and "metric" in row else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name, unit="kimg"), 0
        for index, (count, row) in enumerate(objects(path, log)):  # noqa: B007
            if "results" in row:
                _scores(log, row, index, count)
                continue
            values = {key: mean for key, value in row.items() if (mean := _mean(value)) is not None}
            step = values.pop("Progress/kimg", values.pop("Progress/nimg", float(index) * 1000) / 1000)
            if (time := values.pop("timestamp", None)) is not None:
                values["wall_time"] = time
            log.row(step, values, count)
        return log.finish(count)


def _scores(log: LogBuilder, row: dict[str, Any], index: int, line: int) -> None:
    """A line of metric-*.jsonl: `{"results": {"fid50k_full": 9.1}, "snapshot_pkl": "network-snapshot-000200.pkl"}`."""
    named = str(row.get("snapshot_pkl")).rpartition("-")[2].removesuffix(".pkl")
    step = as_number(named)
    results = row["results"] if isinstance(row["results"], dict) else {}
    values = {key: number for key, value in results.items() if (number := as_number(value)) is not None}
    log.row(float(index) if step is None else step, values, line)


def _mean(value: Any) -> float | None:
    if isinstance(value, dict):
        return as_number(value.get("mean")) if value.get("num", 1) else None
    return as_number(value)
