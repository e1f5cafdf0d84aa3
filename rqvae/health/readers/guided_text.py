"""log.txt of guided-diffusion and improved-diffusion: tables of `| loss | 0.123 |` (openai/baselines, logger.py).

Numbers are printed with three digits, so that steps repeat (2.06e+04 twice): order, not the step, tells rows apart.
"""

from __future__ import annotations

import re
from pathlib import Path

from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.readers._pairs import note_line
from rqvae.health.text import lines_of

_CELL = re.compile(r"^\|\s*(\S.*?)\s*\|\s*(\S+)\s*\|$")
_RULE = re.compile(r"^-{6,}$")


class Reader:
    """A row of points is a table between two rules; its line is that of the cell."""

    name = "guided-text"
    files = ("log.txt",)

    def sniff(self, _path: Path, head: str) -> float:
        cells = re.findall(r"^\|\s*[\w./ -]+\s*\|\s*\S+\s*\|\s*$", head, re.MULTILINE)
        ruled = re.search(r"^-{6,}\s*$", head, re.MULTILINE)
        return 0.97 if ruled and len(cells) >= 2 else 0.6 if head.startswith("Logging to ") else 0.0

    def read(self, path: Path) -> RunLog:
        log, count = LogBuilder(path, self.name), 0
        table: dict[str, tuple[float, int]] = {}
        rows = 0
        for count, text in lines_of(path):  # noqa: B007
            found = _CELL.match(text) if text[:1] == "|" else None
            if found:
                _cell(log, table, count, found)
            elif table and _RULE.match(text):
                _add(log, table, rows)
                table, rows = {}, rows + 1
            elif text[:6] != "------":
                _other(log, count, text)
        if table:
            log.notes.append(f"line {count}: the last table has no end, its {len(table)} values are left out")
        return log.finish(count)


def _cell(log: LogBuilder, table: dict[str, tuple[float, int]], line: int, found: re.Match[str]) -> None:
    try:
        table[found[1]] = (float(found[2]), line)
    except ValueError:
        log.fact(found[1], found[2], line)


def _add(log: LogBuilder, table: dict[str, tuple[float, int]], row: int) -> None:
    step = table.get("step", (float(row), 0))[0]
    for name, (value, line) in table.items():
        if name != "step":
            log.add(name, step, value, line)


def _other(log: LogBuilder, line: int, text: str) -> None:
    if text.startswith("saving model"):
        log.event("checkpoint", line, text)
    elif text.startswith("Logging to"):
        log.event("start", line, text)
        log.fact("log folder", text.removeprefix("Logging to").strip(), line)
    elif text.startswith("Sampling"):
        log.event("sampling", line, text)
    else:
        note_line(log, line, text)
