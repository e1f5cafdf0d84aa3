"""metrics.jsonl of this package: `{"step": 50, "images": 1600, "time": 1.7e9, "train/loss_total": 1.31}`."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._json_lines import first_object, numeric, objects
from rqvae.health.text import lines_of

_MODULE = re.compile(r"assembly: (stage1|connector|stage2) (\w+): ([\d,]+) parameters, ([\d,]+) trainable")
_SAVED = re.compile(r"checkpoint .*step_(\d+)\b")
_BATCH = re.compile(r"on (\d+ x \w+), (\w+): step \d+ of (\d+), (\d+) images a step, (\d+) images an epoch")


class Reader:
    """A null is a value that was not finite; log.txt and FINISHED beside the file are read too."""

    name = "rqvae"
    files = ("metrics.jsonl", "stage*/metrics.jsonl")

    def sniff(self, _path: Path, head: str) -> float:
        row = first_object(head)
        if "step" in row and "images" in row:
            return 0.99
        return 0.45 if "step" in row and any("/" in key for key in row) else 0.0

    def read(self, path: Path) -> RunLog:
        return self.read_beginning(path, None, None, finished=(path.parent / "FINISHED").exists())

    def read_beginning(self, path: Path, rows: int | None, words: int | None, *, finished: bool) -> RunLog:
        """The log as it was.

        Args:
            path: of metrics.jsonl.
            rows: its first lines; None for all.
            words: the same of log.txt.
            finished: whether the run had come to its end.
        """
        log, count = LogBuilder(path, self.name), 0
        for count, row in objects(path, log, rows):  # noqa: B007
            values = numeric(row, null_is_nan=True)
            step = values.pop("step", float(count))
            if (time := values.pop("time", None)) is not None:
                values["wall_time"] = time
            log.row(step, values, count)
        if finished:
            log.event("done", count, "FINISHED")
        if (path.parent / "log.txt").is_file():
            _words(log, path.parent / "log.txt", words)
        return log.finish(count)


def _words(log: LogBuilder, path: Path, first: int | None) -> None:
    """What the run's log.txt states; the events have its lines."""
    for line, text in islice(lines_of(path), first):
        if found := _MODULE.search(text):
            log.fact(f"{found[1]} {found[2]} parameters", found[3], line)
            log.fact(f"{found[1]} trainable parameters", found[4], line)
        elif found := _BATCH.search(text):
            for key, value in zip(
                ("devices", "precision", "steps", "batch size", "dataset images"), found.groups(), strict=True
            ):
                log.fact(key, value, line)
        elif " WARNING " in text:
            log.event("warning", line, text)
        elif "checkpoint" in text:
            saved = _SAVED.search(text)
            log.event("checkpoint", line, text, float(saved[1]) if saved else None)
