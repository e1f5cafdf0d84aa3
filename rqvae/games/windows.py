"""Windows of real play that world models are judged on: fixed by seeds, with the state of the game at their start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rqvae.errors import BadInput
from rqvae.games.maze_chase import MazeChase, MazeState
from rqvae.games.policies import POLICIES
from rqvae.randomness import fold

Frames = npt.NDArray[np.uint8]
Actions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """N windows of real play.

    Args:
        frames: (N, K + horizon, H, W, 3) uint8; the first K are context.
        actions: (N, K + horizon - 1) the actions between them.
        history: K.
        states: the state at the last context frame, to fork the game from; none of a recording.
        ghosts: (N, horizon) how many cells show a ghost in the frames after the context; (N, 0) of a recording.
    """

    frames: Frames
    actions: Actions
    history: int
    states: tuple[MazeState, ...]
    ghosts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def horizon(self) -> int:
        """Frames after the context."""
        return self.frames.shape[1] - self.history

    @property
    def context(self) -> Frames:
        """(N, K, H, W, 3)."""
        return self.frames[:, : self.history]

    @property
    def future(self) -> Frames:
        """(N, horizon, H, W, 3)."""
        return self.frames[:, self.history :]

    @property
    def sha256(self) -> str:
        """Of all frames and actions."""
        return hashlib.sha256(self.frames.tobytes() + self.actions.tobytes()).hexdigest()


def maze_windows(
    game: MazeChase, count: int, *, history: int, horizon: int, seed: int, policy: str = "persistent-random"
) -> Windows:
    """One window from each of the first `count` episodes that are long enough.

    Episode k is `reset(fold("evaluation", seed, k))`; recordings seed theirs from another stream, so that no window is
    one of training. The window begins at a step drawn from the same key.

    Args:
        game: is left in the state it was in.
        count: windows.
        history: K, context frames.
        horizon: frames after them.
        seed: of the evaluation.
        policy: who plays, a key of `POLICIES`.

    Raises:
        BadInput: windows that no episode, or hardly one, is long enough for.
    """
    before, k = game.clone_state(), 0
    found: list[tuple[Frames, Actions, MazeState, Actions]] = []
    while len(found) < count:
        if history + horizon > game.max_steps or k >= 200 * count:
            raise BadInput(
                f"history + horizon: expected windows that episodes of {policy} have room for (at most "
                f"{game.max_steps} steps), got {history} + {horizon} frames, which {len(found)} of {k} episodes have"
            )
        window = _one(game, history + horizon, fold("evaluation", seed, k), policy, history)
        found += [window] if window else []
        k += 1
    game.restore_state(before)
    frames, actions, states, ghosts = zip(*found, strict=True)
    return Windows(np.stack(frames), np.stack(actions), history, tuple(states), np.stack(ghosts))


def recorded_windows(
    episodes: Sequence[tuple[Frames, Actions, npt.NDArray[np.bool_]]],
    count: int,
    *,
    history: int,
    horizon: int,
    seed: int,
) -> Windows:
    """Windows of recorded episodes, drawn without repetition from all places where one fits.

    Args:
        episodes: frames (N, H, W, 3), the actions (N,) taken at them, and (N,) which frames may be the first to be
            predicted: those that training has not seen.
        count: windows.
        history: K, context frames.
        horizon: frames after them.
        seed: of the evaluation.

    Raises:
        BadInput: fewer places than windows.
    """
    length = history + horizon
    places = [
        (k, at)
        for k, (frames, _, fresh) in enumerate(episodes)
        for at in range(len(frames) - length + 1)
        if fresh[at + history]
    ]
    if len(places) < count:
        longest = max(len(frames) for frames, _, _ in episodes)
        raise BadInput(
            f"history + horizon: expected {count} windows of {history} + {horizon} frames, the recording has room for "
            f"{len(places)} in {len(episodes)} episodes, the longest of {longest} frames"
        )
    chosen = np.random.default_rng(fold("recorded windows", seed)).permutation(len(places))[:count]
    frames, actions = [], []
    for k, at in (places[i] for i in chosen):
        frames.append(episodes[k][0][at : at + length])
        actions.append(episodes[k][1][at : at + length - 1])
    return Windows(np.stack(frames), np.stack(actions), history, (), np.zeros((count, 0), dtype=np.int64))


def _one(
    game: MazeChase, length: int, key: int, policy: str, history: int
) -> tuple[Frames, Actions, MazeState, Actions] | None:
    player = POLICIES[policy](len(game.action_names), fold("policy", key))
    frames, actions, states, over = [game.reset(key)], [], [game.clone_state()], False
    while not over:
        actions.append(player.act(game))
        frame, _, terminated, truncated = game.step(actions[-1])
        frames.append(frame)
        states.append(game.clone_state())
        over = terminated or truncated
    # the last frame, in which the game is lost, has no successor to be played from
    room = len(frames) - 1 - length
    if room < 0:
        return None
    at = fold("start", key) % (room + 1)
    ghosts = np.array([len(set(s.ghosts)) for s in states[at + history : at + length]])
    window = slice(at, at + length)
    return np.stack(frames[window]), np.array(actions[at : at + length - 1]), states[at + history - 1], ghosts
