"""Lines of a text file that may be of any encoding, coloured, and written by progress bars."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rqvae.errors import BadInput

HEAD_BYTES = 65536
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\^\[\[[0-9;]*m")
_UTF16 = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}


def encoding_of(head: bytes) -> str:
    """UTF-16 where a byte order mark says so, else UTF-8 (bytes that are not are replaced, one by one)."""
    return _UTF16.get(head[:2], "utf-8-sig" if head[:3] == b"\xef\xbb\xbf" else "utf-8")


def read_head(path: Path) -> bytes:
    """The first 64 KiB.

    Raises:
        BadInput: no such file, or an empty one.
    """
    if not path.is_file():
        raise BadInput(f"{path}: expected the log of a run, there is no such file")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        raise BadInput(f"{path}: expected the log of a run, the file is empty")
    return head


def is_binary(head: bytes) -> bool:
    """Whether bytes are no text: NULs or many control characters, and no byte order mark."""
    if head[:2] in _UTF16:
        return False
    control = sum(byte < 9 or 13 < byte < 27 for byte in head[:4096])
    return b"\0" in head or control > 0.05 * len(head[:4096])


def plain(text: str) -> str:
    """Without colours."""
    return _ANSI.sub("", text) if "\x1b" in text or "^[[" in text else text


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its 1-based number, without colours and line end.

    What a carriage return overwrote (a progress bar) comes as several texts of the same line. A file without line ends
    is read as a whole.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    with path.open(encoding=encoding, errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            line = plain(line).rstrip("\r\n")
            if "\r" in line:
                for part in line.split("\r"):
                    if part:
                        yield number, part
            else:
                yield number, line


def as_number(value: object) -> float | None:
    """A number, or a text that spells one, `nan` and `inf` included; None for all else, and beyond what floats hold."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def wanted_lines(path: Path, wanted: set[int]) -> dict[int, str]:
    """The texts of these lines, in one pass: at most 200 characters without colours; "" for progress bars."""
    found: dict[int, str] = {}
    if not wanted:
        return found
    last, seen = max(wanted), 0
    for line, text in lines_of(path):
        if line > last:
            break
        if line in wanted and text.strip():
            found[line] = "" if line == seen else text.strip()[:200]
            seen = line
    return found
