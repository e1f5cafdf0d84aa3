"""Whether a dream obeys the keys: the real game forked from its exact state, each action held, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rqvae.games.detector import MazeDetector
from rqvae.games.maze import NOOP
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import Frames, Windows
from rqvae.randomness import fold
from rqvae.trainers.rollout_baselines import reseeded

HELD = 3
"""Steps for which an action is held."""
NAMES = {"open": "open_turns", "blocked": "blocked_refused", "noop": "straight_on"}


class Dreams(Protocol):
    """What dreams are asked of, `Dreamer` for example."""

    def __call__(self, context: Frames, past: npt.NDArray[np.int64], ahead: npt.NDArray[np.int64], seed: int) -> Frames:
        """Frames (N, T, H, W, 3) uint8 after `ahead` (N, T) actions."""
        ...


@dataclass(frozen=True)
class Fork:
    """One action held from one window's last context frame.

    Args:
        window: its number.
        action: held for `HELD` steps.
        kind: `open`, a turn into an open way other than straight on; `blocked`, a turn into a wall; `noop`.
        cells: where the real player then is after each step.
        safe: no ghost can catch the player within the steps, whatever the ghosts draw.
    """

    window: int
    action: int
    kind: str
    cells: tuple[int, ...]
    safe: bool


def control(
    dreamer: Dreams, windows: Windows, game: MazeChase, detector: MazeDetector, seed: int
) -> dict[str, float | None]:
    """Whether the dream's player goes where the real one goes when an action is held for three steps.

    A turn into an open way is executed when the player is seen in the true cell after each step; a turn into a wall is
    refused by the same rule, as the real player goes on. A dream's ghosts draw for themselves, so that a player whom
    they catch is elsewhere however well it obeyed. The scores are therefore of the forks in which no ghost can catch
    the player; over all forks they stand beside those of the real game itself under other draws of its ghosts, which
    has lives enough to go on after a catch as a dream does.

    Args:
        dreamer: of the model.
        windows: of `game`, with their states.
        game: the windows were taken from; is left in the state it was in.
        detector: of the player.
        seed: of the noise and of the real game's other draws.

    Returns:
        `open_turns`, `blocked_refused`, `straight_on` (NOOP) and `open_turns_null`, the share of open turns that happen
        under the null action and should be small; None where there was no such fork, and `_count` of them. With `_all`
        over all forks that do not end the episode, with `_all_rerun` the real game's over the same.
    """
    forks, result = find_forks(windows, game), dict[str, float | None]()
    endless = MazeChase(game.size, game.num_ghosts, game.max_steps, maze_seed=game.maze[1], lives=game.lives + HELD)
    for kind, name in NAMES.items():
        # safe ones first, so that their noise does not depend on how many others there are
        found = sorted((fork for fork in forks if fork.kind == kind), key=lambda fork: not fork.safe)
        safe = np.array([fork.safe for fork in found], dtype=bool)
        held = np.array([[fork.action] * HELD for fork in found], dtype=np.int64).reshape(-1, HELD)
        obeyed = _obeyed(_dreamed(dreamer, windows, found, held, seed), detector, found)
        result[name], result[f"{name}_count"] = _share(obeyed[safe]), int(safe.sum())
        result[f"{name}_all"] = _share(obeyed)
        result[f"{name}_all_rerun"] = _share(_obeyed(_replayed(endless, windows, found, seed), detector, found))
        if kind == "open":
            found = found[: int(safe.sum())]
            null = np.full((len(found), HELD), len(game.action_names))
            result["open_turns_null"] = _share(_obeyed(_dreamed(dreamer, windows, found, null, seed), detector, found))
    return result


def find_forks(windows: Windows, game: MazeChase) -> list[Fork]:
    """Every action from every window's state; without those that end the episode and without straight on by its key."""
    before, forks = game.clone_state(), []
    for n, state in enumerate(windows.states):
        for action in range(len(game.action_names)):
            game.restore_state(state)
            safe = not game.may_be_caught([action] * HELD)
            cells: list[int] = []
            while len(cells) < HELD and not game.clone_state().over:
                game.step(action)
                cells.append(game.clone_state().player)
            if game.clone_state().over or action == state.facing:
                continue
            turn = "open" if action in game.ways[state.player] else "blocked"
            forks.append(Fork(n, action, "noop" if action == NOOP else turn, tuple(cells), safe))
    game.restore_state(before)
    return forks


def _dreamed(
    dreamer: Dreams, windows: Windows, forks: Sequence[Fork], held: npt.NDArray[np.int64], seed: int
) -> Frames:
    at = [fork.window for fork in forks]
    if not at:
        return np.zeros((0, HELD, *windows.frames.shape[2:]), dtype=np.uint8)
    return dreamer(windows.context[at], windows.actions[at, : windows.history - 1], held, seed)


def _replayed(game: MazeChase, windows: Windows, forks: Sequence[Fork], seed: int) -> Frames:
    """(N, HELD, H, W, 3): the real game's frames when its ghosts draw anew."""
    frames = np.zeros((len(forks), HELD, *windows.frames.shape[2:]), dtype=np.uint8)
    for n, fork in enumerate(forks):
        game.restore_state(reseeded(windows.states[fork.window], fold(seed, "fork", fork.window, fork.action)))
        for t in range(HELD):
            frames[n, t] = game.render() if game.clone_state().over else game.step(fork.action)[0]
    return frames


def _obeyed(frames: Frames, detector: MazeDetector, forks: Sequence[Fork]) -> npt.NDArray[np.bool_]:
    """(N,): the player is seen in the true cell after each step."""
    seen = np.stack([detector(frames[:, t]).player_cell() for t in range(HELD)], axis=1)
    cells = np.array([fork.cells for fork in forks], dtype=np.int64).reshape(-1, HELD)
    obeyed: npt.NDArray[np.bool_] = (seen == cells).all(1)
    return obeyed


def _share(obeyed: npt.NDArray[np.bool_]) -> float | None:
    return float(obeyed.mean()) if len(obeyed) else None
