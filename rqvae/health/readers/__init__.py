"""Readers of logs, one format a file: a class `Reader` with `name`, `files`, `sniff` and `read`.

A reader of one's own is such a class anywhere; `--format package.module.Class` uses it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol

from rqvae.errors import BadInput
from rqvae.health.log import RunLog
from rqvae.health.text import encoding_of, is_binary, plain, read_head

SURE = 0.1
"""A reader whose score is lower does not know the format."""


class LogReader(Protocol):
    """What a reader offers.

    Attributes:
        name: what `--format` calls it.
        files: names under which a run's folder holds this log, the best first.
    """

    name: str
    files: tuple[str, ...]

    def sniff(self, path: Path, head: str, /) -> float:
        """How sure this format is, 0 to 1, from the name and the first 64 KiB (binary files: latin-1)."""
        ...

    def read(self, path: Path) -> RunLog:
        """The whole log.

        Raises:
            BadInput: it cannot be read after all.
        """
        ...


def readers() -> list[LogReader]:
    """All readers of the package."""
    names = sorted(module.name for module in iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return [module.Reader() for module in modules if hasattr(module, "Reader")]


def reader_named(name: str) -> LogReader:
    """A reader of the package by name, or one's own by `package.module.Class`.

    Raises:
        BadInput: neither.
    """
    known = {reader.name: reader for reader in readers()}
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise BadInput(f"--format {name}: expected one of {', '.join(sorted(known))}, or a class path")
    try:
        return getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise BadInput(f"--format {name}: expected a class that can be imported and made, got {error}") from None


def head_text(path: Path) -> str:
    """The head of a file as text, colours left out; bytes of a binary file as they are.

    Raises:
        BadInput: no such file, or an empty one.
    """
    head = read_head(path)
    if is_binary(head):
        return head.decode("latin-1")
    return plain(head.decode(encoding_of(head), errors="replace"))


def find_log(place: Path) -> Path:
    """The log in a run's folder; a file is itself.

    Raises:
        BadInput: the folder has none.
    """
    if not place.is_dir():
        return place
    for reader in sorted(readers(), key=lambda r: r.name != "rqvae"):
        for pattern in reader.files:
            found = sorted(place.glob(pattern)) or sorted(place.glob(f"*/{pattern}"))
            filled = [path for path in found if path.is_file() and path.stat().st_size > 0]
            if filled:
                return filled[-1]
    names = sorted({pattern for reader in readers() for pattern in reader.files})
    raise BadInput(f"{place}: expected a log in this folder ({', '.join(names)}), found none that is not empty")


def read_log(place: Path, form: str | None = None) -> RunLog:
    """Read a log, or that of a run's folder, with the reader that is surest of it or the one named.

    Raises:
        BadInput: nothing there, a format that no reader knows, or another one than `form`.
    """
    path = find_log(place)
    head = head_text(path)
    if form is not None:
        chosen = reader_named(form)
        if chosen.sniff(path, head) < SURE:
            likely = _surest(path, head)
            other = f"it looks like {likely.name}" if likely else "no reader knows it"
            raise BadInput(f"{path}: expected the format {form}, {other}")
        return chosen.read(path)
    likely = _surest(path, head)
    if likely is None:
        kind = "binary data" if "\0" in head else f"{head[:60]!r}"
        raise BadInput(f"{path}: expected the log of a run in a known format, got {kind}")
    return likely.read(path)


def _surest(path: Path, head: str) -> LogReader | None:
    scored = [(reader.sniff(path, head), -i, reader) for i, reader in enumerate(readers())]
    score, _, reader = max(scored, key=lambda entry: entry[:2])
    return reader if score >= SURE else None
