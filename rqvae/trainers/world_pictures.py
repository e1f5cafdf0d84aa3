"""What a world model shows while it trains: next frames beside the true ones, and dreams beside the recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from rqvae.diffusion.sampling import Sampler
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec
from rqvae.metrics.grids import grouped_grid, image_grid
from rqvae.models.two_stage import TwoStage
from rqvae.trainers.dream import Dream, frame_noise
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures

SHOWN = 4
"""Dreams of a film."""


@runtime_checkable
class Episodes(Protocol):
    """A dataset whose episodes can be walked through, as `GameFrames` can."""

    @property
    def episodes(self) -> int:
        """How many this split has."""
        ...

    def episode(self, k: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Frames (N, H, W, 3) and the actions (N,) taken at them."""
        ...


def continues_frames(spec: DataSpec) -> bool:
    """Whether the data are windows of play: frames of history and actions."""
    return bool(spec.context and spec.num_actions)


@torch.no_grad()
def window_grid(two_stage: TwoStage, walk: SplitWalk, noise: torch.Tensor, sampler: Sampler | None) -> np.ndarray:
    """(H', W', 3) uint8: a window a row, its context | the true next frame | the predicted one.

    Windows and noise are the same at every call, so that the grids of a run can be laid over each other.

    Args:
        two_stage: the model.
        walk: the split; windows are spread evenly over it, neighbours would all look alike.
        noise: (N, C, h, w), as many as there are windows.
        sampler: in place of the model's own.
    """
    batch = walk.spread(len(noise))
    condition = batch.condition
    assert isinstance(condition, ActionCondition)
    assert condition.context is not None
    predicted = two_stage.decode(two_stage.sample(condition, noise[: len(batch)], sampler))
    context = as_pictures(condition.context.flatten(0, 1)).reshape(*condition.context.shape)
    groups = (context, as_pictures(batch.require_img())[:, None], as_pictures(predicted)[:, None])
    return grouped_grid([group.transpose(0, 1, 3, 4, 2) for group in groups], scale=2)


def dream_film(
    two_stage: TwoStage, walk: SplitWalk, spec: DataSpec, frames: int, seed: int, sampler: Sampler | None
) -> Callable[[], np.ndarray]:
    """A function that dreams on from the split's first long episodes under their actions.

    Args:
        two_stage: the model.
        walk: the split, of a dataset with `Episodes`.
        spec: of the data.
        frames: of the film, fewer where no episode has as many.
        seed: of the noise.
        sampler: in place of the model's own.

    Returns:
        A function of nothing that gives (T, H', W', 3) uint8: above the recording, below the dreams.
    """

    @torch.no_grad()
    def film() -> np.ndarray:
        real_nthwc, actions_nt = _starts(walk.stream.dataset, spec.history, frames)
        count, length = actions_nt.shape
        context = torch.from_numpy(real_nthwc[:, : spec.history]).permute(0, 1, 4, 2, 3).to(walk.dtype) / 255
        actions = torch.from_numpy(actions_nt).to(walk.backend.device)
        past = actions[:, : spec.history - 1]
        dream = Dream.begin(two_stage, context.to(walk.backend.device), past, spec.num_actions, sampler)
        sheets = []
        for t in range(spec.history, length):
            noise = torch.stack([frame_noise(two_stage.latent_shape, seed, n, t) for n in range(count)])
            dreamed = as_pictures(dream.step(actions[:, t - 1], noise.to(walk.backend.device)))
            both = np.concatenate((real_nthwc[:, t].transpose(0, 3, 1, 2), dreamed))
            sheets.append(image_grid(both, columns=count, scale=3))
        return np.stack(sheets)

    return film


def _starts(dataset: object, history: int, frames: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(N, K + T, H, W, 3) frames and (N, K + T) actions of the first episodes of the greatest length up to K + T."""
    assert isinstance(dataset, Episodes), "asked before: stage2_trainer"
    lengths = [len(dataset.episode(k)[1]) for k in range(dataset.episodes)]
    length = min(history + frames, max(lengths))
    chosen = [dataset.episode(k) for k, n in enumerate(lengths) if n >= length][:SHOWN]
    return np.stack([frame[:length] for frame, _ in chosen]), np.stack([action[:length] for _, action in chosen])
