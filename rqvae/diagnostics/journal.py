"""What a diagnosis has found so far, a line at a time, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rqvae.diagnostics.rows import Row
from rqvae.errors import BadInput


class Journal:
    """journal.jsonl: a header, `begin`, `row` and `lost` lines, and `finished`; the last row of a path counts.

    `begin` names a unit or, between angle brackets, a search that follows the units. `lost` is written by the process
    around: the unit or the search in which a process ended, with its status.

    Args:
        path: the file.
        header: what makes two diagnoses the same; another one starts anew.
        resume: it must be there, and of this diagnosis.

    Raises:
        BadInput: `resume` without such a journal.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.begun: str | None = None
        self.lost: dict[str, str] = {}
        self.finished = False
        lines = read_lines(path)
        same = bool(lines) and lines[0].get("header") == header
        if resume and not same:
            found = "another diagnosis" if lines else "none"
            raise BadInput(f"--resume: expected {path} of this diagnosis, found {found}")
        self._take(lines[1:] if same else [])
        if self.finished and not resume:
            self.rows, self.lost, self.begun, self.finished, same = {}, {}, None, False, False
        self.goes_on = same
        if not same:
            path.write_text(json.dumps({"header": header}) + "\n", encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def _take(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "row" in line:
                self.rows[line["row"]["path"]] = line["row"]
                self.lost.pop(line["row"]["path"], None)
                self.begun = None
            if "lost" in line:
                self.lost[line["lost"]] = line["status"]
                self.begun = None
            self.begun = line.get("begin", self.begun)
            self.finished = self.finished or "finished" in line

    def begin(self, path: str) -> None:
        """A unit's code is about to be compiled and run, or a search to go on."""
        self._write({"begin": path})

    def row(self, row: Row) -> None:
        """A unit's row is known."""
        self.rows[row["path"]] = row
        self._write({"row": row})

    def finish(self) -> None:
        """Nothing is left to do."""
        self._write({"finished": True})
        self._file.close()

    def close(self) -> None:
        """Close the file; the diagnosis may go on later."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last one that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
