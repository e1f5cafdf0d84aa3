"""The real frames that a dream begins from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rqvae.games.maze_chase import MazeChase, MazeState
from rqvae.games.windows import maze_windows, recorded_windows
from rqvae.trainers.rollout import Recorded

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Start:
    """Where a dream begins.

    Args:
        frames: (K, H, W, 3) uint8, the last K real frames.
        actions: (K - 1,) int64, between them.
        state: of the game at the last frame, where there is a game to play beside.
    """

    frames: Frames
    actions: npt.NDArray[np.int64]
    state: MazeState | None = None


Starts = Callable[[int], Start]
"""From a seed to a start; the same one each time."""


def starts_of_game(game: MazeChase, history: int) -> Starts:
    """Starts from short play of the game, with its state."""

    def start(seed: int) -> Start:
        # a game of its own: sessions begin at the same time, in threads
        own = MazeChase(game.size, game.num_ghosts, game.max_steps, maze_seed=game.maze[1])
        windows = maze_windows(own, 1, history=history, horizon=1, seed=seed)
        return Start(windows.context[0], windows.actions[0, : history - 1], windows.states[0])

    return start


def starts_of_recording(recording: Recorded, history: int) -> Starts:
    """Starts from recorded episodes, without a game; the actions have the recording's numbers."""
    episodes = [(*recording.episode(k), recording.fresh(k)) for k in range(recording.episodes)]

    def start(seed: int) -> Start:
        windows = recorded_windows(episodes, 1, history=history, horizon=1, seed=seed)
        return Start(windows.context[0], windows.actions[0, : history - 1])

    return start


def numbered(starts: Starts, numbers: Sequence[int]) -> Starts:
    """The same starts with the model's numbers of the actions (`rqvae.trainers.dream.model_numbers`)."""

    def start(seed: int) -> Start:
        found = starts(seed)
        return replace(found, actions=np.array(numbers)[found.actions])

    return start


def stored_starts(frames: Frames, actions: npt.NDArray[np.int64]) -> Starts:
    """Starts (N, K, H, W, 3) and (N, K - 1) that were stored beside a model; the game is not needed."""

    def start(seed: int) -> Start:
        at = seed % len(frames)
        return Start(frames[at], actions[at])

    return start
