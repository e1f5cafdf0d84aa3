"""Rows of tables on disk or far away, read by number: Arrow tables of `datasets`, and Parquet files by row group."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.hub import ask

LOOKED_AT = 64
"""Images that go into a table's fingerprint, evenly spaced: all of them would take minutes."""

FOOTERS = 16
"""Files whose footers are read at a time."""


class TableRows:
    """A `datasets.Dataset`, without its decoding of images.

    Args:
        table: the dataset.
        columns: to read; the first one holds images.
        limit: the first so many rows; None is all.
        where: to name in errors.
    """

    def __init__(self, table: Any, columns: list[str], limit: int | None, where: str) -> None:
        from datasets import Image

        check_columns(columns, table.column_names, where)
        table = table.select_columns(columns)
        if isinstance(table.features[columns[0]], Image):
            table = table.cast_column(columns[0], Image(decode=False))
        self._table = table if limit is None else table.select(range(min(limit, len(table))))
        self._columns, self._where = columns, where

    def __len__(self) -> int:
        return len(self._table)

    def check_labels(self, column: str, num_classes: int) -> None:
        """That all labels are integers in [0, num_classes); BadInput with the first that is not."""
        for index, label in enumerate(self._labels(column)):
            if not isinstance(label, int) or not 0 <= label < num_classes:
                raise BadInput(
                    f"{self._where}: {column}: expected integers in [0, {num_classes}), got {label!r} in row {index}"
                )

    def _labels(self, column: str) -> list[Any]:
        return self._table.select_columns([column]).with_format("arrow")[:][column].to_pylist()

    def row(self, index: int) -> dict[str, Any]:
        """The columns of one row."""
        return self._table[index]

    def order(self, shuffled: Callable[[int], Tensor]) -> Tensor:
        """(N,) int64, any permutation."""
        return shuffled(len(self))

    def fingerprint(self) -> str:
        """Of the number of rows, all labels, and `LOOKED_AT` images."""
        digest = hashlib.sha256(f"{len(self)} {self._columns}".encode())
        for column in self._columns[1:]:
            digest.update(repr(self._labels(column)).encode())
        for index in sorted({i * (len(self) - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)}):
            stored = self.row(index)[self._columns[0]]
            content = stored.get("bytes") if isinstance(stored, dict) else stored
            if content is None:
                with open(stored["path"], "rb") as file:
                    content = file.read()
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Group:
    """A row group: file number, number in the file, rows used of it, bytes."""

    file: int
    number: int
    rows: int
    size: int


class ParquetRows:
    """Rows of Parquet files, wherever fsspec reads them, a row group at a time.

    The constructor reads the files' footers, of as many files as `limit` needs.

    Args:
        files: paths or URLs.
        columns: to read.
        limit: the first so many rows; None is all.
        together: row groups that are shuffled together and kept in memory.
        where: to name in errors.
    """

    def __init__(self, files: Sequence[str], columns: list[str], limit: int | None, together: int, where: str) -> None:
        self._files, self._columns, self._together, self._where = files, columns, together, where
        self._footers: list[Any] = []
        self._groups: list[_Group] = []
        left = limit
        for footer in self._read_footers():
            check_columns(columns, footer.schema.to_arrow_schema().names, where)
            self._footers.append(footer)
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                rows = group.num_rows if left is None else min(left, group.num_rows)
                left = None if left is None else left - rows
                if rows:
                    self._groups.append(_Group(len(self._footers) - 1, number, rows, group.total_byte_size))
            if left == 0:
                break
        self._ends = list(accumulate(group.rows for group in self._groups))
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def _read_footers(self) -> Iterator[Any]:
        with ThreadPoolExecutor(FOOTERS) as pool:
            for first in range(0, len(self._files), FOOTERS):
                yield from pool.map(self._footer, range(first, min(first + FOOTERS, len(self._files))))

    def _footer(self, file: int) -> Any:
        from pyarrow import parquet

        with self._opened(file) as source:
            return parquet.read_metadata(source)

    def _opened(self, file: int) -> Any:
        import fsspec

        system, path = fsspec.core.url_to_fs(self._files[file])
        return system.open(path, "rb")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> dict[str, Any]:
        """The columns of one row; reads its row group unless it is among the last ones used."""
        number = bisect_right(self._ends, index)
        if number in self._kept:
            table = self._kept.pop(number)
        else:
            table = ask(self._files[self._groups[number].file], lambda: self._read(number))
        self._kept[number] = table
        if len(self._kept) > self._together:
            self._kept.popitem(last=False)
        within = index - (self._ends[number] - self._groups[number].rows)
        return table.slice(within, 1).to_pylist()[0]

    def _read(self, number: int) -> Any:
        from pyarrow import parquet

        group = self._groups[number]
        with self._opened(group.file) as source:
            # One thread: Arrow's pool of threads does not live on in a forked loader process.
            file = parquet.ParquetFile(source, metadata=self._footers[group.file])
            return file.read_row_group(group.number, columns=self._columns, use_threads=False)

    def order(self, shuffled: Callable[[int], Tensor]) -> Tensor:
        """(N,) int64: row groups in random order, their rows shuffled among `together` of them."""
        order = shuffled(len(self._groups)).tolist()
        parts = []
        for first in range(0, len(order), self._together):
            window = [self._ends[g] - self._groups[g].rows for g in order[first : first + self._together]]
            sizes = [self._groups[g].rows for g in order[first : first + self._together]]
            rows = torch.cat([torch.arange(s, s + n) for s, n in zip(window, sizes, strict=True)])
            parts.append(rows[shuffled(len(rows))])
        return torch.cat(parts)

    def fingerprint(self) -> str:
        """Of the files' names, and the rows and bytes of every row group; and of how many are shuffled together."""
        names = [file.rsplit("/", 1)[-1] for file in self._files[: len(self._footers)]]
        text = f"{names} {[(g.rows, g.size) for g in self._groups]} {self._columns} {self._together}"
        return f"streaming:{hashlib.sha256(text.encode()).hexdigest()}"


def check_columns(wanted: Sequence[str], there: Sequence[str], where: str) -> None:
    """That the columns are there; BadInput with those that are."""
    for key, column in zip(("image_column", "label_column"), wanted, strict=False):
        if column not in there:
            raise BadInput(f"{where}: {key}: expected one of {', '.join(there)}, got {column}")
