"""What JSON-lines formats share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput
from rqvae.health.log import LogBuilder
from rqvae.health.text import as_number, lines_of


def first_object(head: str) -> dict[str, Any]:
    """The object of the first line that is not empty; {} where that is none."""
    for line in head.split("\n"):
        if line.strip():
            return _parse(line) or {}
    return {}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def objects(path: Path, log: LogBuilder, first: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's object; lines that are none are noted in the log, bare NaN is read; of the `first` lines only.

    Raises:
        BadInput: no line is an object.
    """
    broken, good = [], 0
    for line, text in islice(lines_of(path), first):
        row = _parse(text) if text.strip() else None
        if row is not None:
            good += 1
            yield line, row
        elif text.strip():
            broken.append(line)
    if not good:
        raise BadInput(f"{path}: expected JSON objects, one a line, found none")
    if broken:
        log.notes.append(f"{len(broken)} lines are no JSON object (the first is line {broken[0]}) and are left out")


def numeric(row: dict[str, Any], null_is_nan: bool = False) -> dict[str, float]:
    """The values that are numbers; with `null_is_nan` a null, which our log writes for what is not finite, is NaN."""
    found = {}
    for key, value in row.items():
        if isinstance(value, int | float) and (number := as_number(value)) is not None:
            found[key] = number
        elif value is None and null_is_nan:
            found[key] = float("nan")
    return found
