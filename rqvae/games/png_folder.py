"""Recordings of others: a folder of PNG frames with a table of what was done at each."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from rqvae.errors import BadInput
from rqvae.games.recording import Rows

TABLE = "frames.csv"
NEEDED = ("file", "action")
KNOWN = (*NEEDED, "episode", "reward", "done")
_ENDS = {"": False, "0": False, "false": False, "1": True, "true": True}
_MODES = ("RGB", "L", "P", "1")


def action_names(folder: Path) -> tuple[str, ...]:
    """The names in the table's column `action`, sorted, as numbers where all of them are numbers."""
    names = {row["action"] for row in _rows(folder)}
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def read_folder(
    folder: Path, size: int, names: tuple[str, ...], shard_frames: int, progress: Callable[[int], None]
) -> Iterator[Rows]:
    """The frames of `FOLDER/frames.csv` in its order, a shard at a time.

    The table has a row a frame: `file` (a PNG, relative to the folder), `action` (what was done at it, a name or a
    number), and where there are several episodes `episode`, `done` (0 or 1, 1 ends one), or both; `reward` is taken
    over where it is there. Rows of one episode must follow each other.

    Args:
        folder: of the table.
        size: side of the frames, which the PNGs must have: what is resized is no longer what was recorded.
        names: of the actions, see `action_names`.
        shard_frames: a shard is closed at the end of the episode that fills it.
        progress: called with the number of frames that are new.

    Raises:
        BadInput: a table or a picture that is missing or not as said; names file and row.
    """
    rows, name, ended, number, seen = Rows(), "", True, -1, set[str]()
    for line, row in enumerate(_rows(folder), start=2):
        if ended or row["episode"] != name:
            if row["episode"] in seen and row["episode"]:
                raise BadInput(f"{folder / TABLE}: line {line}: episode {row['episode']} goes on after it ended")
            if rows.done:
                rows.done[-1] = True
            if len(rows.frames) >= shard_frames:
                yield rows
                rows = Rows()
            name, number = row["episode"], number + 1
            seen.add(name)
        frame, ended = _picture(folder / row["file"], size), _ends(row["done"], folder, line)
        reward = _number(row["reward"], folder, line)
        rows.append(frame, names.index(row["action"]), reward, done=ended, episode=number)
        progress(1)
    if rows.frames:
        yield rows


def _rows(folder: Path) -> Iterator[dict[str, str]]:
    """The table's rows, with an empty text for what they do not have."""
    path = folder / TABLE
    if not path.is_file():
        raise BadInput(f"{path}: expected a table of frames ({', '.join(KNOWN)}), got no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin it with a mark
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: expected UTF-8, got byte {error.object[error.start]:#04x} at {error.start}") from None
    except OSError as error:
        raise BadInput(f"{path}: expected a table that can be read, got {error.strerror}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in NEEDED if name not in (reader.fieldnames or [])]
    if missing:
        raise BadInput(f"{path}: expected the columns {', '.join(NEEDED)}, there is no {', '.join(missing)}")
    line = 1
    for line, row in enumerate(reader, start=2):
        whole = {name: row.get(name) or "" for name in KNOWN}
        if any(not whole[name] for name in NEEDED):
            raise BadInput(f"{path}: line {line}: expected a file and an action, got {row}")
        yield whole
    if line == 1:
        raise BadInput(f"{path}: expected a row a frame, got none")


def _number(text: str, folder: Path, line: int) -> float:
    try:
        return float(text or 0)
    except ValueError:
        raise BadInput(f"{folder / TABLE}: line {line}: reward: expected a number, got {text}") from None


def _ends(text: str, folder: Path, line: int) -> bool:
    if (word := text.strip().lower()) not in _ENDS:
        raise BadInput(f"{folder / TABLE}: line {line}: done: expected 0 or 1, got {text}")
    return _ENDS[word]


def _picture(path: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            kind, mode, frame = picture.format, picture.mode, np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow says damaged files
        raise BadInput(f"{path}: expected a PNG, got {type(error).__name__}") from error
    if kind != "PNG":
        raise BadInput(f"{path}: expected a PNG (frames stay lossless), got {kind}")
    if mode not in _MODES:
        raise BadInput(f"{path}: expected 8 bits a colour without transparency, got a PNG of mode {mode}")
    if frame.shape != (size, size, 3):
        raise BadInput(f"{path}: expected {size} x {size} pixels, got {frame.shape[1]} x {frame.shape[0]}")
    return frame.copy()


def pictures_sha256(folder: Path) -> str:
    """Of the table and of every picture that it names."""
    whole = hashlib.sha256((folder / TABLE).read_bytes() if (folder / TABLE).is_file() else b"")
    for row in _rows(folder):
        path = folder / row["file"]
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()
