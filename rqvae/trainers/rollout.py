"""Evaluation of a world model: one step, rollouts, control and persistence, beside what copying would score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rqvae.errors import BadInput
from rqvae.games.detector import MazeDetector
from rqvae.games.maze import NOOP
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import Frames, Windows, maze_windows
from rqvae.metrics.moving import PixelErrors
from rqvae.metrics.reconstruction import to_uint8
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fold
from rqvae.trainers.dream import Dream, frame_noise

HORIZONS = (1, 2, 4, 8, 16, 32, 64)
HELD = 3
"""Steps for which an action is held when control is measured."""


@dataclass
class Dreamer:
    """Dreams from real windows, in batches.

    Args:
        two_stage: the trained model.
        num_actions: of the game.
        numbers: the model's number of each of the game's actions (`model_numbers`); None where they are the same.
        sampler: in place of the model's own.
        batch_size: dreams at once; the frames do not depend on it.
        progress: called after each generated batch of frames with their number.
    """

    two_stage: TwoStage
    num_actions: int
    numbers: Sequence[int] | None = None
    sampler: Any = None
    batch_size: int = 64
    progress: Callable[[int], None] = field(default=lambda _: None)

    def __call__(self, context: Frames, past: npt.NDArray[np.int64], ahead: npt.NDArray[np.int64], seed: int) -> Frames:
        """Frames (N, T, H, W, 3) uint8 after `ahead` (N, T) actions.

        Args:
            context: (N, K, H, W, 3) uint8.
            past: (N, K - 1) actions between the context frames.
            ahead: (N, T) actions from the last context frame on.
            seed: of the noise; dream n's step t is keyed by (seed, n, t).
        """
        parts = []
        device = next(self.two_stage.stage2.parameters()).device
        if self.numbers is not None:
            table = np.array([*self.numbers, self.num_actions])
            past, ahead = table[past], table[ahead]
        for first in range(0, len(context), self.batch_size):
            part = slice(first, first + self.batch_size)
            frames = torch.from_numpy(context[part]).permute(0, 1, 4, 2, 3).float().to(device) / 255
            dream = Dream.begin(
                self.two_stage, frames, torch.from_numpy(past[part]).to(device), self.num_actions, self.sampler
            )
            steps = []
            for t, actions in enumerate(ahead[part].T):
                shape, many = self.two_stage.latent_shape, range(first, first + len(frames))
                noise = torch.stack([frame_noise(shape, seed, n, t) for n in many]).to(device)
                generated = dream.step(torch.from_numpy(actions.copy()).to(device), noise)
                steps.append(to_uint8(generated).permute(0, 2, 3, 1).cpu().numpy())
                self.progress(len(frames))
            parts.append(np.stack(steps, axis=1))
        return np.concatenate(parts)


def one_step(dreamer: Dreamer, windows: Windows, seed: int, horizon: int = 8) -> dict[str, float]:
    """PSNR of the next frame after real context, on `horizon` frames of each window, beside copying the last frame."""
    model, copy, k = PixelErrors(), PixelErrors(), windows.history
    for t in range(min(horizon, windows.horizon)):
        context, target = windows.frames[:, t : t + k], windows.frames[:, t + k]
        actions = windows.actions[:, t : t + k]
        predicted = dreamer(context, actions[:, :-1], actions[:, -1:], fold(seed, "one_step", t))[:, 0]
        model.update(predicted, target, context[:, -1])
        copy.update(context[:, -1], target, context[:, -1])
    return {
        "psnr": model.psnr,
        "psnr_moving": model.psnr_moving,
        "copy_last": copy.psnr,
        "copy_last_moving": copy.psnr_moving,
    }


def rollout_psnr(dreams: Frames, windows: Windows, horizons: Sequence[int]) -> dict[str, dict[str, float]]:
    """PSNR of the h-th dreamed frame against the logged one, beside the last context frame kept for ever."""
    rows: dict[str, dict[str, float]] = {}
    for h in horizons:
        model, copy = PixelErrors(), PixelErrors()
        target, before = windows.future[:, h - 1], windows.frames[:, windows.history + h - 2]
        model.update(dreams[:, h - 1], target, before)
        copy.update(windows.context[:, -1], target, before)
        rows[str(h)] = {"psnr": model.psnr, "psnr_moving": model.psnr_moving}
        rows[str(h)] |= {"copy_first": copy.psnr, "copy_first_moving": copy.psnr_moving}
    return rows


def persistence(
    dreams: Frames, windows: Windows, detector: MazeDetector, horizons: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Shares of rollouts whose player is there once, and whose ghosts are as many as in the real game, at horizon h."""
    player, ghosts = {}, {}
    for h in horizons:
        seen = detector(dreams[:, h - 1])
        player[str(h)] = float((seen.player.sum(1) == 1).mean())
        ghosts[str(h)] = float((seen.ghosts.sum(1) == windows.ghosts[:, h - 1]).mean())
    return {"player_visible": player, "ghosts_visible": ghosts}


def control(
    dreamer: Dreamer, windows: Windows, game: MazeChase, detector: MazeDetector, seed: int
) -> dict[str, float | None]:
    """Whether the dream's player goes where the real one goes when an action is held for three steps.

    From the state of each window's last context frame the real game is forked once an action. A turn into an open way,
    other than straight on, is executed when the player is seen in the true cell after each step; a turn into a wall is
    refused by the same rule, as the real player goes on. Forks that end the episode within three steps are left out.

    Returns:
        `open_turns`, `blocked_refused`, `straight_on` (NOOP) and `open_turns_null`: the share of open turns that happen
        under the null action, which should be small; None where there was no such case; and how many there were.
    """
    cases = _cases(windows, game)
    rows = {name: [case for case in cases if case.kind == name] for name in ("open", "blocked", "noop")}
    result: dict[str, float | None] = {}
    names = {"open": "open_turns", "blocked": "blocked_refused", "noop": "straight_on"}
    for kind, found in rows.items():
        result[names[kind]] = _followed(dreamer, windows, detector, found, seed, None)
        result[f"{names[kind]}_count"] = len(found)
    result["open_turns_null"] = _followed(dreamer, windows, detector, rows["open"], seed, len(game.action_names))
    return result


@dataclass(frozen=True)
class _Case:
    window: int
    action: int
    kind: str
    cells: tuple[int, ...]


def _cases(windows: Windows, game: MazeChase) -> list[_Case]:
    """Every action from every window's state, with the cells that the real player then walks through."""
    before, cases = game.clone_state(), []
    for n, state in enumerate(windows.states):
        for action in range(len(game.action_names)):
            game.restore_state(state)
            cells: list[int] = []
            while len(cells) < HELD and not game.clone_state().over:
                game.step(action)
                cells.append(game.clone_state().player)
            if game.clone_state().over:
                continue
            if action == NOOP:
                kind = "noop"
            elif action == state.facing:
                continue
            else:
                kind = "open" if action in game.ways[state.player] else "blocked"
            cases.append(_Case(n, action, kind, tuple(cells)))
    game.restore_state(before)
    return cases


def _followed(
    dreamer: Dreamer, windows: Windows, detector: MazeDetector, cases: list[_Case], seed: int, action: int | None
) -> float | None:
    if not cases:
        return None
    at = [case.window for case in cases]
    held = np.array([[case.action if action is None else action] * HELD for case in cases])
    frames = dreamer(windows.context[at], windows.actions[at, : windows.history - 1], held, seed)
    seen = np.stack([detector(frames[:, t]).player_cell() for t in range(HELD)], axis=1)
    return float((seen == np.array([case.cells for case in cases])).all(1).mean())


def evaluate(
    dreamer: Dreamer,
    game: MazeChase,
    *,
    history: int,
    starts: int = 48,
    horizon: int = 64,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """All scores on the maze, as means over evaluation seeds, with what each seed gave.

    Args:
        dreamer: of the model.
        game: with the size and the ghosts of the recording.
        history: K.
        starts: windows a seed.
        horizon: longest rollout.
        seeds: of windows and noise.

    Raises:
        BadInput: no seed, no start or no horizon.
    """
    if not seeds or starts < 1 or horizon < HELD:
        raise BadInput(f"rollout: expected seeds, starts >= 1 and horizon >= {HELD}, got {seeds}, {starts}, {horizon}")
    detector = MazeDetector(game)
    horizons = [h for h in HORIZONS if h <= horizon]
    rows, hashes = [], []
    for seed in seeds:
        windows = maze_windows(game, starts, history=history, horizon=horizon, seed=seed)
        hashes.append(windows.sha256)
        ahead = windows.actions[:, history - 1 :]
        dreams = dreamer(windows.context, windows.actions[:, : history - 1], ahead, seed)
        row: dict[str, Any] = {"one_step": one_step(dreamer, windows, seed)}
        row["rollout"] = rollout_psnr(dreams, windows, horizons)
        row |= persistence(dreams, windows, detector, horizons)
        row |= control(dreamer, windows, game, detector, seed)
        rows.append(row)
    facts = {"starts": starts, "seeds": list(seeds), "horizon": horizon, "game": game.fingerprint(), "windows": hashes}
    return {**_means(rows), "detector_error": detector.error(game), "by_seed": rows, "protocol": facts}


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over the rows that have it, in the same tree; None where none has."""
    means: dict[str, Any] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        known = [x for x in values if not isinstance(x, dict) and x is not None and np.isfinite(x)]
        means[key] = _means(values) if isinstance(value, dict) else float(np.mean(known)) if known else None
    return means
