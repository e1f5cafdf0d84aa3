"""Recording games: whole episodes in lossless shards, described by a `meta.json` that is written last.

A recording is a function of its parameters, so a folder that holds a complete one is reused, one without `meta.json`
was interrupted and is done again, and any episode can be replayed from its number.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput
from rqvae.files import write_whole
from rqvae.games.maze_chase import MazeChase
from rqvae.games.policies import POLICIES, Playable
from rqvae.randomness import fold

SCHEMA = 1
META = "meta.json"
LICENCE = "Frames of MAE-DiT's own game, drawn by its code; free to use under Apache-2.0 like the code."


class Game(Playable, Protocol):
    """What can be recorded."""

    action_names: tuple[str, ...]
    version: int

    def reset(self, seed: int) -> npt.NDArray[np.uint8]:
        """Start an episode; returns its first frame (H, W, 3)."""

    def step(self, action: int) -> tuple[npt.NDArray[np.uint8], float, bool, bool]:
        """Play a step; returns frame, reward, terminated, truncated."""


GAMES: dict[str, Callable[[int, int, int], Game]] = {"maze-chase": MazeChase}
"""Name -> (size, num_ghosts, max_steps) -> game."""


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


def _no_progress(_: int) -> None:
    """Tells nobody."""


def collect(
    env_name: str,
    frames: int,
    size: int,
    out: Path,
    *,
    seed: int = 0,
    policy: str = "persistent-random",
    num_ghosts: int = 1,
    max_steps: int = 400,
    shard_frames: int = 10_000,
    progress: Callable[[int], None] = _no_progress,
) -> dict[str, Any]:
    """Record frames of a game, or reuse the same recording that is already there.

    Each shard is an npz with `frames` uint8 (N, size, size, 3), `action` int16 (N,) taken at that frame, `reward`
    float32 (N,) and `done` bool (N,) that this action gave, and `episode` int32 (N,). The frame after an episode's last
    action is not recorded. Episode k is `reset(fold(seed, "episode", k))` played by the policy seeded with
    `fold(seed, "policy", k)`; the last one is cut where the budget ends.

    Args:
        env_name: a key of `GAMES`.
        frames: how many frames in all, at least 1.
        size: side of a frame in pixels.
        out: folder.
        seed: of the recording.
        policy: a key of `POLICIES`.
        num_ghosts: ghosts in the maze.
        max_steps: longest episode.
        shard_frames: a shard is closed at the end of the episode that fills it.
        progress: called with the number of frames that are new since the last call.

    Returns:
        The content of `meta.json`.

    Raises:
        BadInput: an unknown game, an argument out of range, a file in the place of `out`, a folder that cannot be
            written, or one that holds a recording with other parameters.
    """
    game = _game(env_name, frames, size, num_ghosts, max_steps, shard_frames)
    if policy not in POLICIES:
        raise BadInput(f"policy: expected one of {', '.join(POLICIES)}, got {policy}")
    parameters = {
        "schema": SCHEMA,
        "env": env_name,
        "env_version": game.version,
        "size": size,
        "frames": frames,
        **{"seed": seed, "policy": policy},
        "num_ghosts": num_ghosts,
        "max_steps": max_steps,
        "shard_frames": shard_frames,
    }
    _make_folder(out)
    if (ready := _complete(out, parameters)) is not None:
        progress(frames)
        return ready
    for old in (out / META, *_own_files(out)):
        old.unlink(missing_ok=True)
    return write_recording(out, parameters, game.action_names, _record(game, parameters, progress))


def write_recording(
    out: Path, parameters: dict[str, Any], action_names: Sequence[str], recording: Iterable[Rows]
) -> dict[str, Any]:
    """Write the shards, and last meta.json, which makes the recording complete.

    Args:
        out: folder that exists.
        parameters: what meta.json says first; readers need `schema`, `size` and `seed`.
        action_names: in the order of their numbers.
        recording: rows of each shard; at least one, none empty. Episodes are numbered from 0 without a gap and do not
            cross shards.

    Returns:
        The content of `meta.json`.
    """
    shards: list[dict[str, Any]] = []
    for rows in recording:
        shards.append(_write_shard(out / f"shard-{len(shards):05d}.npz", rows))
        episodes, last_done = 1 + rows.episode[-1], rows.done[-1]
    meta = parameters | {
        "episodes": episodes,
        "last_episode_complete": last_done,
        "action_names": list(action_names),
        "licence": LICENCE,
        "shards": shards,
    }
    write_whole(out / META, (json.dumps(meta, indent=1) + "\n").encode())
    return meta


def _game(env_name: str, frames: int, size: int, num_ghosts: int, max_steps: int, shard_frames: int) -> Game:
    if env_name not in GAMES:
        raise BadInput(f"game: expected one of {', '.join(sorted(GAMES))}, got {env_name}")
    for name, value in (("frames", frames), ("shard_frames", shard_frames)):
        if value < 1:
            raise BadInput(f"{name}: expected at least 1, got {value}")
    return GAMES[env_name](size, num_ghosts, max_steps)


def _record(game: Game, parameters: dict[str, Any], progress: Callable[[int], None]) -> Iterator[Rows]:
    """Play until all frames are recorded; gives the rows of one shard at a time."""
    rows, left, k = Rows(), parameters["frames"], 0
    while left:
        before = len(rows.frames)
        _play(game, parameters, k, left, rows)
        new = len(rows.frames) - before
        left, k = left - new, k + 1
        progress(new)
        if len(rows.frames) >= parameters["shard_frames"] or not left:
            yield rows
            rows = Rows()


def _play(game: Game, parameters: dict[str, Any], k: int, limit: int, rows: Rows) -> None:
    """Append episode k, or its first `limit` frames, to `rows`."""
    seed = parameters["seed"]
    frame = game.reset(fold(seed, "episode", k))
    policy = POLICIES[parameters["policy"]](len(game.action_names), fold(seed, "policy", k))
    for _ in range(limit):
        action = policy.act(game)
        after, reward, terminated, truncated = game.step(action)
        rows.append(frame, action, reward, done=bool(terminated or truncated), episode=k)
        frame = after
        if rows.done[-1]:
            return


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out}: expected a folder that can be made, got {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise BadInput(f"{out}: expected a folder that can be written, got one without the permission")


def _own_files(out: Path) -> list[Path]:
    """Shards and unfinished files of an interrupted recording."""
    return [*out.glob("shard-*.npz"), *out.glob(".*.partial")]


def _complete(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
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
        if meta.get(key) != value:
            raise BadInput(
                f"{path}: {key}: expected {value}, got a recording with {meta.get(key)}; choose another folder"
            )
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
