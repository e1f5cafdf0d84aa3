"""What CSV formats share: rows with their line numbers, and cells that are numbers, empty or something else."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from rqvae.errors import BadInput
from rqvae.health.text import encoding_of

_STEPS = ("step", "global_step", "_step", "trainer/global_step", "iteration", "iter", "steps", "itr")


def header_of(head: str) -> list[str]:
    """The cells of the first line; [] where it is no CSV header."""
    first = head.lstrip("\ufeff\r\n ").split("\n", 1)[0].strip()
    if first.count(",") < 1 or len(first) > 20000:
        return []
    try:
        cells = next(csv.reader([first]))
    except csv.Error:
        return []
    return [cell.strip() for cell in cells]


def is_table(head: str) -> bool:
    """Whether the first line names columns and the second, if there is one, has as many cells."""
    names = header_of(head)
    if len(names) < 2 or not all(names[1:]) or any(_number(name) is not None for name in names):
        return False
    lines = [line for line in head.split("\n")[:3] if line.strip()]
    return len(lines) < 2 or abs(lines[1].count(",") - lines[0].count(",")) <= lines[0].count('"')


def rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row with its line, the header first; a byte that is no text is replaced, a NUL left out.

    Raises:
        BadInput: a row that is no CSV.
    """
    with path.open("rb") as raw:
        encoding = encoding_of(raw.read(4))
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        reader = csv.reader(line.replace("\0", "") for line in file)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise BadInput(f"{path}: line {reader.line_num}: expected a row of a CSV table, got {error}") from None


def table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Names of the columns and the rows below them.

    Raises:
        BadInput: there is a header and nothing below it.
    """
    stream = rows(path)
    _, names = next(stream)
    first = next(stream, None)
    if first is None:
        raise BadInput(f"{path}: expected rows below the header {','.join(names)[:60]!r}, found none")
    return [name.strip() for name in names], chain([first], stream)


def step_column(names: list[str]) -> int | None:
    """Index of the column that holds the step."""
    lowered = [name.lower() for name in names]
    return next((lowered.index(name) for name in _STEPS if name in lowered), None)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def numbers(names: list[str], row: list[str], skip: int | None) -> dict[str, float]:
    """The cells that are numbers, by column; empty and other cells are left out."""
    found = {}
    for i, (name, cell) in enumerate(zip(names, row, strict=False)):
        if cell and i != skip:
            value = _number(cell)
            if value is not None:
                found[name] = value
    return found
