"""progress.json of guided-diffusion's logger: one object a log interval, bare NaN included."""

from __future__ import annotations

from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._json_lines import first_object, numeric, objects

_STEPS = ("step", "global_step", "_step", "iteration", "iter", "epoch")


class Reader:
    """Flat objects with a `step` (or a counter of another name) and numbers."""

    name = "guided-json"
    files = ("progress.json", "log.jsonl", "logs.json")

    def sniff(self, path: Path, head: str) -> float:
        row = first_object(head)
        if "images" in row or "log_history" in row or not numeric(row):
            return 0.0
        if "step" in row and ({"loss_q0", "samples", "grad_norm"} & set(row) or path.name.startswith("progress")):
            return 0.95
        counted = any(key in row for key in _STEPS)
        return 0.5 if counted and any("loss" in key.lower() for key in row) else 0.2 if counted else 0.0

    def read(self, path: Path) -> RunLog:
        log, count, last = LogBuilder(path, self.name), 0, -1.0
        for index, (count, row) in enumerate(objects(path, log)):  # noqa: B007
            values = numeric(row)
            key = next((key for key in _STEPS if key in values), None)
            last = values.pop(key) if key else max(last, float(index))
            for text_key, value in row.items():
                if isinstance(value, str) and index < 3:
                    log.fact(text_key, value, count)
            log.row(last, values, count)
        return log.finish(count)
