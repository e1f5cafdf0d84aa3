"""progress.csv of guided-diffusion and improved-diffusion: one row a log interval, empty where nothing was logged."""

from __future__ import annotations

from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._tables import header_of, is_table, numbers, step_column, table


class Reader:
    """Columns `loss`, `loss_q0..3`, `grad_norm`, `samples`, `step` in any order."""

    name = "guided-csv"
    files = ("progress.csv",)

    def sniff(self, path: Path, head: str) -> float:
        names = set(header_of(head))
        if not is_table(head) or "step" not in names or "epoch" in names:
            return 0.0
        if {"loss_q0", "samples", "mse_q0", "vb_q0"} & names:
            return 0.97
        return 0.9 if path.name.endswith("progress.csv") else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name), 0
        names, rows = table(path)
        step_at = step_column(names)
        for row_index, (count, row) in enumerate(rows):  # noqa: B007
            values = numbers(names, row, skip=step_at)
            step = numbers(["step"], row[step_at : step_at + 1], skip=None) if step_at is not None else {}
            log.row(step.get("step", float(row_index)), values, count)
        return log.finish(count)
