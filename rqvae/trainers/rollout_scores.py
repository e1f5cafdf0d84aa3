"""Scores of dreams against logged play: one step on, h steps on, what is still there, how frames are distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rqvae.games.detector import MazeDetector
from rqvae.games.windows import Frames, Windows
from rqvae.metrics.extractors import Extractor
from rqvae.metrics.frame_scores import FrameScores
from rqvae.metrics.frechet import frechet_features
from rqvae.metrics.perceptual import LPIPSScore
from rqvae.randomness import fold
from rqvae.trainers.rollout_baselines import Baselines

Dreams = Callable[[Frames, npt.NDArray[np.int64], npt.NDArray[np.int64], int], Frames]
"""A `Dreamer`: (context, past actions, actions ahead, seed) -> frames."""


@dataclass(frozen=True)
class Networks:
    """Networks that some scores need, loaded; without one its scores are left out.

    Args:
        lpips: of LPIPS.
        extractor: of the features whose Fréchet distance is taken.
    """

    lpips: LPIPSScore | None = None
    extractor: Extractor | None = None

    def facts(self) -> dict[str, Any]:
        """What a result file says of them."""
        facts: dict[str, Any] = {"lpips": self.lpips.key} if self.lpips else {}
        return facts | ({"frechet": self.extractor.identity()} if self.extractor else {})


def one_step(
    dreamer: Dreams,
    windows: Windows,
    seed: int,
    baselines: Baselines | None = None,
    horizon: int = 8,
    lpips: LPIPSScore | None = None,
) -> dict[str, float]:
    """Scores of the next frame after real context, on `horizon` frames of each window.

    Returns:
        `psnr`, `psnr_moving`, `ssim` (and `lpips`) of the model; those of copying the last frame under `copy_last`,
        `copy_last_moving`, ...; with `baselines` also those of the `mean_frame` and, where there is one, of the game's
        `rerun`.
    """
    again = baselines.again if baselines else None
    names = ["", "copy_last", *(["mean_frame"] if baselines else []), *(["rerun"] if again else [])]
    scores = {name: FrameScores(lpips) for name in names}
    k = windows.history
    for t in range(min(horizon, windows.horizon)):
        context, target = windows.frames[:, t : t + k], windows.frames[:, t + k]
        actions, before = windows.actions[:, t : t + k], windows.frames[:, t + k - 1]
        predicted = dreamer(context, actions[:, :-1], actions[:, -1:], fold(seed, "one_step", t))[:, 0]
        scores[""].update(predicted, target, before)
        scores["copy_last"].update(before, target, before)
        if baselines:
            scores["mean_frame"].update(np.broadcast_to(baselines.mean, target.shape), target, before)
        if again:
            scores["rerun"].update(again.steps[:, t], target, before)
    return {key: value for name, sums in scores.items() for key, value in sums.result(name).items()}


def rollout_scores(
    dreams: Frames,
    windows: Windows,
    horizons: Sequence[int],
    baselines: Baselines,
    lpips: LPIPSScore | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of the h-th dreamed frame against the logged one.

    Returns:
        By horizon: those of the model as in `one_step`, of the last context frame kept for ever (`copy_first`), of the
        `mean_frame` and, where there is one, of the game's `rerun`, which are of the share `rerun_running` of re-runs
        that are not over.
    """
    rows: dict[str, dict[str, float]] = {}
    for h in horizons:
        target, before = windows.future[:, h - 1], windows.frames[:, windows.history + h - 2]
        guesses = {
            "": dreams[:, h - 1],
            "copy_first": windows.context[:, -1],
            "mean_frame": np.broadcast_to(baselines.mean, target.shape),
        }
        row: dict[str, float] = {}
        for name, guess in guesses.items():
            sums = FrameScores(lpips)
            sums.update(guess, target, before)
            row |= sums.result(name)
        if again := baselines.again:
            sums, running = FrameScores(lpips), again.running[:, h - 1]
            if running.any():
                sums.update(again.reruns[running, h - 1], target[running], before[running])
            row |= sums.result("rerun") | {"rerun_running": float(running.mean())}
        rows[str(h)] = row
    return rows


def persistence(
    dreams: Frames,
    windows: Windows,
    detector: MazeDetector,
    horizons: Sequence[int],
    running: npt.NDArray[np.bool_] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Shares of rollouts whose player is there once, and whose ghosts are as many as in the real game, at horizon h.

    Args:
        dreams: (N, horizon, H, W, 3) uint8.
        windows: that they began from.
        detector: of sprites.
        horizons: h.
        running: (N, horizon) bool, which of them count; None is all. A share of none is None.
    """
    player: dict[str, float | None] = {}
    ghosts: dict[str, float | None] = {}
    for h in horizons:
        seen = detector(dreams[:, h - 1])
        counts = np.ones(len(dreams), dtype=np.bool_) if running is None else running[:, h - 1]
        once, as_many = seen.player.sum(1) == 1, seen.ghosts.sum(1) == windows.ghosts[:, h - 1]
        player[str(h)] = float(once[counts].mean()) if counts.any() else None
        ghosts[str(h)] = float(as_many[counts].mean()) if counts.any() else None
    return {"player_visible": player, "ghosts_visible": ghosts}


def frechet(
    dreams: Frames, windows: Windows, horizons: Sequence[int], baselines: Baselines, extractor: Extractor
) -> dict[str, float]:
    """Fréchet distance of single frames at all horizons, dreamed and logged, in the features of an image network.

    It knows nothing of motion and is no FVD, which takes the features of a video network (I3D) on clips. With as few
    frames as here it is biased upwards, alike for the `rerun`, which says what two true sets of this size give.

    Returns:
        NAME, NAME_copy_first and, where the game can be played again, NAME_rerun, where NAME is the extractor's.
    """
    at = [h - 1 for h in horizons]
    kept = np.repeat(windows.context[:, -1:], len(at), axis=1)
    sets = {"": dreams[:, at], "_copy_first": kept}
    if again := baselines.again:
        sets["_rerun"] = again.reruns[:, at][again.running[:, at]]
    true = _features(extractor, windows.future[:, at])
    name = extractor.name
    return {f"{name}{key}": frechet_features(_features(extractor, x), true).value for key, x in sets.items()}


def _features(extractor: Extractor, frames: Frames, batch: int = 32) -> torch.Tensor:
    """(N, D) of frames (..., H, W, 3)."""
    images = torch.from_numpy(frames.reshape(-1, *frames.shape[-3:]).copy()).permute(0, 3, 1, 2).contiguous()
    return torch.cat([extractor(part).pooled for part in images.split(batch)])
