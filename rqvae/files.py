"""Small files, read with a clear error and written whole or not at all. A leaf."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """A JSON object.

    Args:
        path: the file.
        remedy: what to do about a damaged one, for the error.

    Raises:
        BadInput: there is no such file, or it is not a JSON object.
    """
    after = f"; {remedy}" if remedy else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: expected a JSON file, got: {error.strerror}{after}") from error
    except ValueError as error:
        raise BadInput(f"{path}: expected a JSON object, got: {error}{after}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(content).__name__}{after}")
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its suffix, for new content; takes its place where the block ends without error.

    A reader, or a kill, never meets half a file. The folder is the same because `os.replace` is atomic only within a
    file system; the name is new each time because several hosts, processes or threads may write the same file.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Give `path` this content (text as UTF-8), or leave it as it was."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Give `path` this value as JSON, or leave it as it was; NaN and infinity, which JSON does not have, are null."""
    write_whole(path, json.dumps(_without_non_finite(value), indent=1, allow_nan=False))


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
