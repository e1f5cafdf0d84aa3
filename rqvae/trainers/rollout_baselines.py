"""What a world model is compared with: the mean frame, and the real game itself when its ghosts choose anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rqvae.games.maze_chase import MazeChase, MazeState
from rqvae.games.policies import POLICIES
from rqvae.games.windows import Frames, Windows
from rqvae.randomness import fold


@dataclass(frozen=True)
class Again:
    """The real game played again from N windows: the same states and actions, other random numbers.

    Args:
        steps: (N, S, H, W, 3) uint8: the frame after each of the first S steps, from the logged state before it.
        reruns: (N, horizon, H, W, 3) uint8 after the logged actions; the last frame stays once the game is over.
        running: (N, horizon) bool, False where it was over before.
    """

    steps: Frames
    reruns: Frames
    running: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Baselines:
    """Predictions that need no model.

    Args:
        mean: (H, W, 3) uint8, the mean of frames of other episodes.
        again: the game played again; None where there is only a recording of it.
    """

    mean: Frames
    again: Again | None = None


def make_baselines(game: MazeChase, windows: Windows, seed: int, steps: int = 8) -> Baselines:
    """Play the windows again: the same states and actions, other random numbers of the ghosts.

    No model can foresee what the ghosts draw, so the re-run is how far apart two true futures are. A model that answers
    with the mean of all futures has a better PSNR than it and a worse picture.

    Args:
        game: the windows were taken from; is left in the state it was in.
        windows: N of them.
        seed: of the new random numbers.
        steps: S, single steps from each window's first frames.
    """
    before, k = game.clone_state(), windows.history
    singles, reruns, running = [], [], []
    for n, start in enumerate(windows.states):
        actions = [int(action) for action in windows.actions[n, k - 1 :]]
        singles.append(_single_steps(game, start, actions[:steps], fold(seed, "rerun", n)))
        game.restore_state(reseeded(start, fold(seed, "rerun", n)))
        frames: list[Frames] = []
        alive: list[bool] = []
        for action in actions:
            alive.append(not game.clone_state().over)
            frames.append(game.step(action)[0] if alive[-1] else frames[-1])
        reruns.append(np.stack(frames))
        running.append(alive)
    game.restore_state(before)
    return Baselines(mean_frame(game), Again(np.stack(singles), np.stack(reruns), np.array(running)))


def mean_frame(game: MazeChase, episodes: int = 50, steps: int = 20) -> Frames:
    """(H, W, 3) uint8: the mean of the first frames of episodes that no evaluation begins from."""
    before = game.clone_state()
    frames: list[Frames] = []
    for k in range(episodes):
        frames.append(game.reset(fold("mean frame", k)))
        player = POLICIES["persistent-random"](len(game.action_names), fold("mean frame", "policy", k))
        for _ in range(steps - 1):
            if game.clone_state().over:
                break
            frames.append(game.step(player.act(game))[0])
    game.restore_state(before)
    mean: npt.NDArray[np.float64] = np.stack(frames).mean(0)
    return np.round(mean).astype(np.uint8)


def _single_steps(game: MazeChase, start: MazeState, actions: list[int], key: int) -> Frames:
    """(S, H, W, 3): each action from the logged state before it, with the ghosts' new numbers."""
    frames, state = [], start
    for t, action in enumerate(actions):
        game.restore_state(reseeded(state, fold(key, t)))
        frames.append(game.step(action)[0])
        game.restore_state(state)
        game.step(action)
        state = game.clone_state()
    return np.stack(frames)


def reseeded(state: MazeState, seed: int) -> MazeState:
    """The same state with another generator: what is drawn from here on is drawn anew."""
    return replace(state, generator=np.random.PCG64(seed).state)
