"""Recording games: our own maze, Gymnasium's environments, and folders of frames that others have recorded.

A recording is a function of its parameters, so a folder that holds a complete one is reused, one without `meta.json`
was interrupted and is done again, and any episode can be replayed from its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput
from rqvae.games.gymnasium_game import GymnasiumGame
from rqvae.games.maze_chase import MazeChase
from rqvae.games.png_folder import action_names, pictures_sha256, read_folder
from rqvae.games.policies import POLICIES, Playable
from rqvae.games.recording import LICENCE, META, SCHEMA, Rows, complete, make_folder, own_files, write_recording
from rqvae.randomness import fold

MAZE, BLIND = "maze-chase", "persistent-random"
"""Our own game; the policy that asks nothing of a game, for those of others."""


class Game(Playable, Protocol):
    """What can be recorded."""

    action_names: tuple[str, ...]

    @property
    def version(self) -> int | str:
        """What must be the same for the same frames."""

    def reset(self, seed: int) -> npt.NDArray[np.uint8]:
        """Start an episode; returns its first frame (H, W, 3)."""

    def step(self, action: int) -> tuple[npt.NDArray[np.uint8], float, bool, bool]:
        """Play a step; returns frame, reward, terminated, truncated."""


def _no_progress(_: int) -> None:
    """Tells nobody."""


def collect(
    env_name: str,
    frames: int,
    size: int,
    out: Path,
    *,
    seed: int = 0,
    policy: str = BLIND,
    num_ghosts: int = 1,
    lives: int = 1,
    max_steps: int = 400,
    skip: int = 4,
    shard_frames: int = 10_000,
    progress: Callable[[int], None] = _no_progress,
) -> dict[str, Any]:
    """Record frames of a game, or reuse the same recording that is already there.

    Each shard is an npz with `frames` uint8 (N, size, size, 3), `action` int16 (N,) taken at that frame, `reward`
    float32 (N,) and `done` bool (N,) that this action gave, and `episode` int32 (N,). The frame after an episode's last
    action is not recorded. Episode k is `reset(fold(seed, "episode", k))` played by the policy seeded with
    `fold(seed, "policy", k)`; the last one is cut where the budget ends.

    Args:
        env_name: `maze-chase`, or an environment of Gymnasium, for example `ALE/MsPacman-v5`.
        frames: how many frames in all, at least 1.
        size: side of a frame in pixels.
        out: folder.
        seed: of the recording.
        policy: a key of `POLICIES`; of games that are not ours `persistent-random` alone.
        num_ghosts: ghosts in the maze.
        lives: of the maze's player.
        max_steps: longest episode.
        skip: of `GymnasiumGame`.
        shard_frames: a shard is closed at the end of the episode that fills it.
        progress: called with the number of frames that are new since the last call.

    Returns:
        The content of `meta.json`.

    Raises:
        BadInput: an unknown game, an argument out of range, a file in the place of `out`, a folder that cannot be
            written, or one that holds a recording with other parameters.
    """
    for name, value in (("frames", frames), ("shard_frames", shard_frames)):
        if value < 1:
            raise BadInput(f"{name}: expected at least 1, got {value}")
    game, licence, own = _game(env_name, size, policy, num_ghosts, lives, max_steps, skip)
    parameters = {"schema": SCHEMA, "env": env_name, "env_version": game.version, "size": size, "frames": frames}
    parameters |= {"seed": seed, "policy": policy, **own, "max_steps": max_steps, "shard_frames": shard_frames}
    make_folder(out)
    if (ready := complete(out, parameters)) is not None:
        progress(frames)
        return ready
    _clear(out)
    return write_recording(out, parameters, game.action_names, _record(game, parameters, progress), licence)


def _game(
    env_name: str, size: int, policy: str, num_ghosts: int, lives: int, max_steps: int, skip: int
) -> tuple[Game, str, dict[str, int]]:
    """The game, what may be done with its frames, and the parameters that it alone has."""
    if policy not in POLICIES:
        raise BadInput(f"policy: expected one of {', '.join(POLICIES)}, got {policy}")
    if env_name == MAZE:
        own = {"num_ghosts": num_ghosts, "lives": lives}
        return MazeChase(size, num_ghosts, max_steps, lives=lives), LICENCE, own
    if policy != BLIND:
        raise BadInput(f"policy: expected {BLIND} for {env_name}, whose rules are not known, got {policy}")
    other = GymnasiumGame(env_name, size, max_steps, skip)
    return other, other.licence, {"skip": skip}


def import_folder(
    folder: Path,
    size: int,
    out: Path,
    *,
    seed: int = 0,
    shard_frames: int = 10_000,
    progress: Callable[[int], None] = _no_progress,
) -> dict[str, Any]:
    """Make a recording of PNG frames and their table (`rqvae.games.png_folder`), or reuse the one that is there.

    Args:
        folder: with the table `frames.csv`.
        size: side of the frames.
        out: folder of the recording.
        seed: that the splits are drawn by.
        shard_frames: a shard is closed at the end of the episode that fills it.
        progress: called with the number of frames that are new since the last call.

    Returns:
        The content of `meta.json`.

    Raises:
        BadInput: as `read_folder`; a folder that cannot be written, or that holds another recording.
    """
    names = action_names(folder)
    parameters = {"schema": SCHEMA, "env": f"a folder with sha256 {pictures_sha256(folder)}", "size": size}
    parameters |= {"seed": seed, "shard_frames": shard_frames}
    make_folder(out)
    if (ready := complete(out, parameters)) is not None:
        progress(ready["frames"])
        return ready
    _clear(out)
    recording = read_folder(folder, size, names, shard_frames, progress)
    return write_recording(out, parameters, names, recording, f"As the folder {folder.name}, whose frames these are.")


def _clear(out: Path) -> None:
    """Remove what an interrupted recording left."""
    for old in (out / META, *own_files(out)):
        old.unlink(missing_ok=True)


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
