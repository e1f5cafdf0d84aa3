"""Any text with `step 100 ... loss: 0.123` or `epoch=3 loss=0.2`: read with little trust."""

from __future__ import annotations

import re
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._pairs import NUMBER, PAIR, clock, note_line
from rqvae.health.text import lines_of

_STEP = re.compile(
    r"\b(?:global[_ ]?step|train[_ ]?step|steps?|iter(?:ation)?s?|itr|it)\b\s*[:=#]?\s*[\[(]?\s*(\d+)", re.IGNORECASE
)
_EPOCH = re.compile(r"\bepochs?\b\s*[:=#]?\s*[\[(]?\s*(\d+)", re.IGNORECASE)
_VALUE = re.compile(rf"([A-Za-z][\w/.-]*)(?: (?:is|=|:)|\s*[:=])?\s+({NUMBER})(?![\w.:/%])", re.IGNORECASE)
_HELD_OUT = re.compile(r"^\W*(?:\[[^\]]*\]\s*)*(test|val\w*|eval\w*|dev)\b", re.IGNORECASE)
_NO_METRIC = {"step", "steps", "iter", "iteration", "epoch", "it", "itr", "global_step", "train_step", "time", "eta"}
TRUST = 0.4


class Reader:
    """A point is a line with a loss and numbers; a line that begins with test or val is held out: `val_loss`."""

    name = "generic"
    files = ("*.log", "*.out", "train*.txt")

    def sniff(self, _path: Path, head: str) -> float:
        if "\0" in head:
            return 0.0
        hits = sum(bool(_values(line)) for line in head.splitlines()[:2000])
        return 0.25 if hits >= 2 else 0.12 if hits == 1 else 0.0

    def read(self, path: Path) -> RunLog:
        log, count, index = LogBuilder(path, self.name, trust=TRUST, unit="row"), 0, 0
        for count, text in lines_of(path):  # noqa: B007
            values = _values(text) if len(text) < 2000 else {}
            if not values:
                note_line(log, count, text)
                continue
            found = _STEP.search(text)
            if found:
                log.unit = "step"
            step = float(found[1]) if found else float(index)
            index += 1
            if (epoch := _EPOCH.search(text)) and found:
                values["epoch"] = float(epoch[1])
            log.row(step, values, count)
            if (time := clock(text)) is not None:
                log.add("wall_time", step, time, count)
        return log.finish(count)


def _values(text: str) -> dict[str, float]:
    """The numbers of a line that has a loss, by name; {} for other lines."""
    if "loss" not in text.lower():
        return {}
    found: dict[str, float] = {}
    for key, value in [*PAIR.findall(text), *_VALUE.findall(text)]:
        name = key.strip().split(" ")[-1] if "loss" not in key.lower() else key.strip()
        if name.lower() not in _NO_METRIC:
            found.setdefault(name, float(value.replace("_", "")))
    if not any("loss" in name.lower() for name in found):
        return {}
    held_out = _HELD_OUT.search(text)
    return {f"val_{name}": value for name, value in found.items()} if held_out else found
