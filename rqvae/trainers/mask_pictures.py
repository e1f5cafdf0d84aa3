"""Images and coloured masks beside the samples that a generator makes of these masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
from torch import Tensor

from rqvae.callbacks.pictures import Pictures
from rqvae.durations import Duration, DurationText
from rqvae.img_datasets.interfaces import MaskCondition
from rqvae.mask_colours import coloured
from rqvae.metrics.grids import image_grid
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures


def mask_pictures(walk: SplitWalk, images: int, every: DurationText) -> list[Pictures]:
    """Observers that write `images` and `masks` of the split's first images, in the order of `samples`.

    Args:
        walk: the split whose masks the samples are made of.
        images: how many.
        every: when samples are made.
    """
    draws: dict[str, Callable[[], np.ndarray]] = {
        "images": lambda: sheet(as_pictures(walk.first(images).require_img())),
        "masks": lambda: sheet(mask_colours(walk.first(images).condition)),
    }
    return [Pictures(name, Duration.parse(every), contextlib.nullcontext, draw) for name, draw in draws.items()]


def mask_colours(condition: object) -> np.ndarray:
    """(B, 3, H, W) uint8 of a `MaskCondition`."""
    assert isinstance(condition, MaskCondition), "only data of masks have these pictures"
    mask_bhw: Tensor = condition.mask
    return coloured(mask_bhw.cpu().numpy(), condition.num_classes)


def sheet(images_nchw_u8: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, about as wide as high: the arrangement of the grid of samples."""
    return image_grid(images_nchw_u8, columns=max(1, round(len(images_nchw_u8) ** 0.5)))
