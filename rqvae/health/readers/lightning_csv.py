"""metrics.csv of Lightning's CSVLogger, and any other table with a step: columns are filled in different rows."""

from __future__ import annotations

from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._tables import header_of, is_table, numbers, step_column, table


class Reader:
    """Columns `epoch`, `step` and metrics; a table without a step counts in epochs, or in rows."""

    name = "lightning-csv"
    files = ("metrics.csv",)

    def sniff(self, _path: Path, head: str) -> float:
        names = {name.lower() for name in header_of(head)}
        if not is_table(head):
            return 0.0
        if {"epoch", "step"} <= names:
            return 0.93
        named = bool(names & {"step", "global_step", "epoch", "iteration", "iter"})
        return (0.5 if any("loss" in name for name in names) else 0.3) if named else 0.0

    def read(self, path: Path) -> RunLog:
        names, rows = table(path)
        step_at = step_column(names)
        epoch_at = next((i for i, name in enumerate(names) if name.lower() == "epoch"), None)
        counter = step_at if step_at is not None else epoch_at
        log = LogBuilder(path, self.name, unit="step" if step_at is not None else "epoch" if epoch_at else "row")
        count, last = 0, -1.0
        for count, row in rows:  # noqa: B007
            own = numbers(["step"], row[counter : counter + 1], skip=None) if counter is not None else {}
            last = own.get("step", last + 1 if counter is None else max(last, 0.0))
            log.row(last, numbers(names, row, skip=counter), count)
        return log.finish(count)
