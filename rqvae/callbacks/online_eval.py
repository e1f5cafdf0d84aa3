"""Scores on the validation split while training, from the weights that will be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.durations import Duration


@dataclass
class OnlineEval(Observer):
    """Adds `evaluate(run)`'s scores to the row whenever `every` is due.

    Args:
        every: how often.
        weights: context in which the model computes with the evaluated weights (EMA).
        evaluate: scores by name, for example `val/psnr`; collective, every rank gets the same.
    """

    every: Duration
    weights: Callable[[], AbstractContextManager[Any]]
    evaluate: Callable[[RunView], Mapping[str, float]]

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if run.clock.due(self.every):
            with self.weights():
                scores = self.evaluate(run)
            run.log_scalars(scores)
