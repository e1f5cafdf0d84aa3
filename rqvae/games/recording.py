"""What a recording is: lossless shards of whole episodes, described by a `meta.json` that is written last."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput
from rqvae.files import write_whole

SCHEMA = 1
META = "meta.json"
LICENCE = "Frames of MAE-DiT's own game, drawn by its code; free to use under Apache-2.0 like the code."


@dataclass
class Rows:
    """Rows of the episodes of one shard, before they are written; the fields are its columns."""

    frames: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    action: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    episode: list[int] = field(default_factory=list)

    def append(self, frame: npt.NDArray[np.uint8], action: int, reward: float, *, done: bool, episode: int) -> None:
        """A frame (H, W, 3), the action taken at it, and what that gave."""
        self.frames.append(frame)
        self.action.append(action)
        self.reward.append(reward)
        self.done.append(done)
        self.episode.append(episode)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "frames": np.stack(self.frames),
            "action": np.array(self.action, dtype=np.int16),
            "reward": np.array(self.reward, dtype=np.float32),
            "done": np.array(self.done, dtype=np.bool_),
            "episode": np.array(self.episode, dtype=np.int32),
        }


def write_recording(
    out: Path,
    parameters: dict[str, Any],
    action_names: Sequence[str],
    recording: Iterable[Rows],
    licence: str = LICENCE,
) -> dict[str, Any]:
    """Write the shards, and last meta.json, which makes the recording complete.

    Args:
        out: folder that exists.
        parameters: what meta.json says first; readers need `schema`, `size` and `seed`.
        action_names: in the order of their numbers.
        recording: rows of each shard; at least one, none empty. Episodes are numbered from 0 without a gap and do not
            cross shards.
        licence: what whoever has the folder may do with the frames.

    Returns:
        The content of `meta.json`.
    """
    shards: list[dict[str, Any]] = []
    for rows in recording:
        shards.append(_write_shard(out / f"shard-{len(shards):05d}.npz", rows))
        episodes, last_done = 1 + rows.episode[-1], rows.done[-1]
    meta = parameters | {
        "frames": sum(shard["frames"] for shard in shards),
        "episodes": episodes,
        "last_episode_complete": last_done,
        "action_names": list(action_names),
        "licence": licence,
        "shards": shards,
    }
    write_whole(out / META, (json.dumps(meta, indent=1) + "\n").encode())
    return meta


def make_folder(out: Path) -> None:
    """Make the folder of a recording; BadInput where it cannot be made or written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out}: expected a folder that can be made, got {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise BadInput(f"{out}: expected a folder that can be written, got one without the permission")


def own_files(out: Path) -> list[Path]:
    """Shards and unfinished files of an interrupted recording."""
    return [*out.glob("shard-*.npz"), *out.glob(".*.partial")]


OLDER = {"lives": 1}
"""What a recording was made with that does not say so, as it is older than the parameter."""


def complete(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The meta of a complete recording with these parameters; None where there is none or its shards are damaged."""
    path = out / META
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
        sizes = [(out / shard["file"], shard["bytes"]) for shard in meta["shards"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{path}: expected the description of a recording, got {error!r}; remove the folder") from error
    for key, value in parameters.items():
        found = meta.get(key, OLDER.get(key))
        if found != value:
            raise BadInput(f"{path}: {key}: expected {value}, got a recording with {found}; choose another folder")
    return meta if all(p.is_file() and p.stat().st_size == n for p, n in sizes) else None


def _write_shard(path: Path, rows: Rows) -> dict[str, Any]:
    """Write one shard; returns its entry in `meta.json`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **rows.arrays())  # type: ignore[arg-type]
    content = buffer.getvalue()
    write_whole(path, content)
    return {
        "file": path.name,
        "frames": len(rows.frames),
        "episodes": 1 + rows.episode[-1] - rows.episode[0],
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
