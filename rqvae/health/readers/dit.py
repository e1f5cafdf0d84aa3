"""log.txt of DiT and what came of it: fast-DiT, SiT, LightningDiT (github.com/facebookresearch/DiT, train.py).

`[2024-10-30 14:51:01] (step=0000100) Train Loss: 0.1479, Train Steps/Sec: 0.67`, in colours.
"""

from __future__ import annotations

import re
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._pairs import clock, note_line, pairs
from rqvae.health.text import lines_of

_POINT = re.compile(r"\(step=(\d+)\)(.*)")
_USUAL = re.compile(r"\(step=(\d+)\) Train Loss: (\d+\.?\d*), Train Steps/Sec: (\d+\.?\d*)$")
_HEADER = re.compile(r"Experiment directory created at|\b\w*[DS]iT Parameters: |Beginning epoch \d+")
_EPOCH = re.compile(r"Beginning epoch (\d+)")


class Reader:
    """Points are lines with `(step=N)`; time stamps become the series `wall_time` in seconds."""

    name = "dit"
    files = ("log.txt",)

    def sniff(self, _path: Path, head: str) -> float:
        if re.search(r"\(step=\d+\) Train Loss:", head):
            return 0.98
        return 0.9 if _HEADER.search(head) else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name), 0
        for count, text in lines_of(path):  # noqa: B007  (the last number is the number of lines)
            if usual := _USUAL.search(text):
                step, loss, rate = map(float, usual.groups())
                log.add("Train Loss", step, loss, count)
                log.add("Train Steps/Sec", step, rate, count)
            elif found := _POINT.search(text):
                step = float(found[1])
                log.row(step, pairs(found[2]), count)
            else:
                _event(log, count, text)
                continue
            if (time := clock(text)) is not None:
                log.add("wall_time", step, time, count)
        return log.finish(count)


def _event(log: LogBuilder, line: int, text: str) -> None:
    if found := _EPOCH.search(text):
        log.event("epoch", line, found[1])
    elif "Saved checkpoint" in text:
        log.event("checkpoint", line, text)
    elif text.rstrip().endswith("Done!"):
        log.event("done", line, text)
    else:
        if "Experiment directory created" in text:
            log.event("start", line, text)
        note_line(log, line, text)
