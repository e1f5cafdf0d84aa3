"""A panel of Weights & Biases exported as CSV: `"Step","RUN - METRIC","RUN - METRIC__MIN","RUN - METRIC__MAX"`.

Every run is a run of its own; __MIN and __MAX are the borders of what the export averaged and are no points.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._tables import header_of, is_table, numbers, table

_BORDERS = ("__MIN", "__MAX")


class Reader:
    """Runs are columns; `Step`, or whatever the panel's axis was, is the first."""

    name = "wandb-csv"
    files = ("*wandb*.csv",)

    def sniff(self, _path: Path, head: str) -> float:
        names = header_of(head)
        if not is_table(head):
            return 0.0
        marked = any(name.endswith(_BORDERS) for name in names)
        return 0.98 if marked else 0.95 if any(" - " in name for name in names[1:]) else 0.0

    def read(self, path: Path) -> RunLog:
        names, _ = table(path)
        kept = [i for i, name in enumerate(names) if i and " - " in name and not name.endswith(_BORDERS)]
        axis = names[0].lower()
        log = LogBuilder(path, self.name, unit="step" if "step" in axis else "time" if "time" in axis else axis)
        labels = dict.fromkeys(names[i].rpartition(" - ")[0] for i in kept)
        last = 1
        for label in labels:
            log.begin_run(label if len(labels) > 1 else "")
            mine = {i: names[i].rpartition(" - ")[2] for i in kept if names[i].rpartition(" - ")[0] == label}
            for last, step, values in _points(path, mine):  # noqa: B007
                log.row(step, values, last)
        return log.finish(last)


def _points(path: Path, columns: dict[int, str]) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(line, step, values by metric) of each row; a run is one pass, so that no more than its own points are held."""
    _, rows = table(path)
    for index, (line, row) in enumerate(rows):
        first = numbers(["step"], row[:1], skip=None)
        values: dict[str, float] = {}
        for i, metric in columns.items():
            values |= numbers([metric], row[i : i + 1], skip=None)
        yield line, first.get("step", float(index)), values
