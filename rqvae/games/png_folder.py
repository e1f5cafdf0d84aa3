"""Recordings of others: a folder of PNG frames with a table of what was done at each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rqvae.errors import BadInput
from rqvae.games.recording import Rows

TABLE = "frames.csv"
NEEDED = ("file", "action")
KNOWN = (*NEEDED, "episode", "reward", "done")


def action_names(folder: Path) -> tuple[str, ...]:
    """The names in the table's column `action`, sorted, as numbers where all of them are numbers."""
    names = {row["action"] for row in _rows(folder)}
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def read_folder(
    folder: Path, size: int, names: tuple[str, ...], shard_frames: int, progress: Callable[[int], None]
) -> Iterator[Rows]:
    """The frames of `FOLDER/frames.csv` in its order, a shard at a time.

    The table has a row a frame: `file` (a PNG, relative to the folder), `action` (what was done at it, a name or a
    number), and where there are several episodes `episode`; `reward` and `done` are taken over where they are there.
    Rows of one episode must follow each other. An action that has a name keeps its number for all episodes.

    Args:
        folder: of the table.
        size: side of the frames, which the PNGs must have: what is resized is no longer what was recorded.
        names: of the actions, see `action_names`.
        shard_frames: a shard is closed at the end of the episode that fills it.
        progress: called with the number of frames that are new.

    Raises:
        BadInput: a table or a picture that is missing or not as said; names file and row.
    """
    rows, episode, seen = Rows(), "", set[str]()
    for line, row in enumerate(_rows(folder), start=2):
        if not rows.frames or row["episode"] != episode:
            if row["episode"] in seen:
                raise BadInput(f"{folder / TABLE}: line {line}: episode {row['episode']} goes on after another began")
            if rows.done:
                rows.done[-1] = True
            if len(rows.frames) >= shard_frames:
                yield rows
                rows = Rows()
            episode = row["episode"]
            seen.add(episode)
        frame = _picture(folder / row["file"], size)
        done = row["done"].strip().lower() in ("1", "true")
        rows.append(frame, names.index(row["action"]), _number(row, folder, line), done=done, episode=len(seen) - 1)
        progress(1)
    if rows.frames:
        yield rows


def _rows(folder: Path) -> Iterator[dict[str, str]]:
    """The table's rows, with an empty text for what they do not have."""
    path = folder / TABLE
    if not path.is_file():
        raise BadInput(f"{path}: expected a table of frames ({', '.join(KNOWN)}), got no such file")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or [])]
        if missing:
            raise BadInput(f"{path}: expected the columns {', '.join(NEEDED)}, there is no {', '.join(missing)}")
        empty = True
        for line, row in enumerate(reader, start=2):
            empty = False
            whole = {name: row.get(name) or "" for name in KNOWN}
            if any(not whole[name] for name in NEEDED):
                raise BadInput(f"{path}: line {line}: expected a file and an action, got {row}")
            yield whole
        if empty:
            raise BadInput(f"{path}: expected a row a frame, got none")


def _number(row: dict[str, str], folder: Path, line: int) -> float:
    try:
        return float(row["reward"] or 0)
    except ValueError:
        raise BadInput(f"{folder / TABLE}: line {line}: reward: expected a number, got {row['reward']}") from None


def _picture(path: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            kind, frame = picture.format, np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"{path}: expected a PNG, got {type(error).__name__}") from error
    if kind != "PNG":
        raise BadInput(f"{path}: expected a PNG (frames stay lossless), got {kind}")
    if frame.shape != (size, size, 3):
        raise BadInput(f"{path}: expected {size} x {size} pixels, got {frame.shape[1]} x {frame.shape[0]}")
    return frame.copy()
