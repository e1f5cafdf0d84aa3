"""Evaluation of a world model: one step, rollouts, control and persistence, beside what copying would score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rqvae.errors import BadInput
from rqvae.games.detector import MazeDetector
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import Frames, Windows, maze_windows, recorded_windows
from rqvae.metrics.intervals import finite, tree_intervals, tree_means
from rqvae.models.two_stage import TwoStage
from rqvae.trainers.dream import Dream, frame_noise
from rqvae.trainers.evaluation_trainer import finite_pictures
from rqvae.trainers.rollout_baselines import Baselines, make_baselines
from rqvae.trainers.rollout_control import HELD, control
from rqvae.trainers.rollout_scores import Networks, frechet, one_step, persistence, rollout_scores

HORIZONS = (1, 2, 4, 8, 16, 32, 64)


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

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInput(f"batch_size: expected at least 1, got {self.batch_size}")

    def __call__(self, context: Frames, past: npt.NDArray[np.int64], ahead: npt.NDArray[np.int64], seed: int) -> Frames:
        """Frames (N, T, H, W, 3) uint8 after `ahead` (N, T) actions; RunFailed where one is not finite.

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
                latents = dream.context_bkchw[:, -1]
                pictures = finite_pictures(generated, latents, many, f"frame {t + 1} of the dreams from starts")
                steps.append(pictures.transpose(0, 2, 3, 1))
                self.progress(len(frames))
            parts.append(np.stack(steps, axis=1))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Rollout:
    """What one evaluation seed dreamed, for those who look at it.

    Args:
        windows: real play.
        dreams: (N, horizon, H, W, 3) uint8, under the logged actions.
        baselines: for the same windows.
    """

    windows: Windows
    dreams: Frames
    baselines: Baselines


class Recorded(Protocol):
    """Recorded episodes, as `GameFrames` has them once it is open."""

    @property
    def episodes(self) -> int:
        """How many."""
        ...

    def episode(self, k: int) -> tuple[Frames, npt.NDArray[np.int64]]:
        """Frames (N, H, W, 3) and the actions (N,) taken at them."""
        ...

    def fresh(self, k: int) -> npt.NDArray[np.bool_]:
        """(N,) which of these frames training has not seen."""
        ...

    def fingerprint(self) -> str:
        """A text that names them."""
        ...


def _nobody(_: Rollout) -> None:
    """Looks at nothing."""


def evaluate(
    dreamer: Dreamer,
    game: MazeChase,
    *,
    history: int,
    starts: int = 48,
    horizon: int = 64,
    seeds: Sequence[int] = (0, 1, 2),
    networks: Networks | None = None,
    look: Callable[[Rollout], None] = _nobody,
) -> dict[str, Any]:
    """All scores on the maze, as means over evaluation seeds with their intervals, with what each seed gave.

    Args:
        dreamer: of the model.
        game: with the size and the ghosts of the recording.
        history: K.
        starts: windows a seed.
        horizon: longest rollout.
        seeds: of windows and noise.
        networks: of LPIPS and of the Fréchet distance; without them these scores are left out.
        look: called with what each seed dreamed.

    Returns:
        The scores; `interval`, the same tree with the 95 % interval [low, high] of each mean by Student's t over the
        seeds, None with fewer than two; `by_seed`; `protocol`. A number that is not finite is None.

    Raises:
        BadInput: no seed, no start or no horizon.
    """
    _check(seeds, starts, horizon)
    networks, detector = networks or Networks(), MazeDetector(game)
    horizons = [h for h in HORIZONS if h <= horizon]
    rows, hashes = [], []
    for seed in seeds:
        windows = maze_windows(game, starts, history=history, horizon=horizon, seed=seed)
        baselines = make_baselines(game, windows, seed)
        row, dreams = _frame_scores(dreamer, windows, baselines, horizons, seed, networks)
        hashes.append(windows.sha256)
        row |= persistence(dreams, windows, detector, horizons)
        assert baselines.again is not None
        rerun = persistence(baselines.again.reruns, windows, detector, horizons, baselines.again.running)
        row |= {f"{name}_rerun": shares for name, shares in rerun.items()}
        row |= control(dreamer, windows, game, detector, seed)
        rows.append(finite(row))
        look(Rollout(windows, dreams, baselines))
    facts = {"starts": starts, "seeds": list(seeds), "horizon": horizon, "game": game.fingerprint(), "windows": hashes}
    return _summed(rows, facts | networks.facts()) | {"detector_error": detector.error(game)}


def evaluate_recording(
    dreamer: Dreamer,
    recording: Recorded,
    mean: Frames,
    *,
    history: int,
    starts: int = 48,
    horizon: int = 64,
    seeds: Sequence[int] = (0, 1, 2),
    networks: Networks | None = None,
    look: Callable[[Rollout], None] = _nobody,
) -> dict[str, Any]:
    """The scores of frames alone, on windows of a recording: of a game that can be neither forked nor looked into.

    Args:
        dreamer: of the model; its numbers of the actions are the recording's.
        recording: the split to begin from.
        mean: (H, W, 3) uint8, the mean frame of another split.
        history: K.
        starts: windows a seed.
        horizon: longest rollout.
        seeds: of windows and noise.
        networks: as in `evaluate`.
        look: as in `evaluate`.

    Returns:
        As `evaluate`, without control, persistence, the error of the detector and the game's re-run.

    Raises:
        BadInput: no seed, no start or no horizon; fewer windows than starts.
    """
    _check(seeds, starts, horizon)
    networks, horizons = networks or Networks(), [h for h in HORIZONS if h <= horizon]
    episodes = [(*recording.episode(k), recording.fresh(k)) for k in range(recording.episodes)]
    rows, hashes = [], []
    for seed in seeds:
        windows = recorded_windows(episodes, starts, history=history, horizon=horizon, seed=seed)
        hashes.append(windows.sha256)
        baselines = Baselines(mean)
        row, dreams = _frame_scores(dreamer, windows, baselines, horizons, seed, networks)
        rows.append(finite(row))
        look(Rollout(windows, dreams, baselines))
    facts = {"starts": starts, "seeds": list(seeds), "horizon": horizon, "game": recording.fingerprint()}
    return _summed(rows, {**facts, "windows": hashes} | networks.facts())


def _check(seeds: Sequence[int], starts: int, horizon: int) -> None:
    if not seeds or starts < 1 or horizon < HELD:
        raise BadInput(f"rollout: expected seeds, starts >= 1 and horizon >= {HELD}, got {seeds}, {starts}, {horizon}")


def _frame_scores(
    dreamer: Dreamer, windows: Windows, baselines: Baselines, horizons: Sequence[int], seed: int, networks: Networks
) -> tuple[dict[str, Any], Frames]:
    """The scores that need frames alone, and the dreams that were scored."""
    past, ahead = np.split(windows.actions, [windows.history - 1], axis=1)
    dreams = dreamer(windows.context, past, ahead, seed)
    row: dict[str, Any] = {"one_step": one_step(dreamer, windows, seed, baselines, lpips=networks.lpips)}
    row["rollout"] = rollout_scores(dreams, windows, horizons, baselines, networks.lpips)
    if networks.extractor is not None:
        row["frechet"] = frechet(dreams, windows, horizons, baselines, networks.extractor)
    return row, dreams


def _summed(rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    return {**tree_means(rows), "interval": tree_intervals(rows), "by_seed": rows, "protocol": facts}
