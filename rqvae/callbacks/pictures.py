"""Grids of reconstructions or samples, and films of dreams, while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.durations import Duration

FILM_FPS = 8
"""Frames a second: slow enough to see each step of a game."""


@dataclass
class Pictures(Observer):
    """Shows `draw()` whenever `every` is due, made with the evaluated weights.

    Args:
        name: of the picture, for example `samples`.
        every: how often.
        weights: context in which the model computes with the evaluated weights (EMA).
        draw: makes the picture (H, W, 3) uint8; called by every rank, so that sharded models can compute.
    """

    name: str
    every: Duration
    weights: Callable[[], AbstractContextManager[Any]]
    draw: Callable[[], np.ndarray]

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if run.clock.due(self.every):
            with self.weights():
                shown = self.draw()
            self.show(run, shown)

    def show(self, run: RunView, shown: np.ndarray) -> None:
        """Give what was drawn to the run's log."""
        run.log_picture(self.name, shown)


@dataclass
class Films(Pictures):
    """The same of films: `draw()` makes (T, H, W, 3) uint8."""

    def show(self, run: RunView, shown: np.ndarray) -> None:
        """Give the film to the run's log."""
        run.log_film(self.name, shown, FILM_FPS)
