"""Paths from data to noise, and what a network may predict on them.

A path is x_t = alpha(t) x0 + sigma(t) noise, with t = 0 data and t = 1 noise. Everything a network can predict is a
combination a(t) x0 + b(t) noise; `COMBINATIONS` lists (a, b) of each, and every conversion follows from that table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rqvae.errors import BadInput

Prediction = Literal["velocity", "x0", "eps", "v"]
Combination = tuple[Tensor, Tensor]


class Path(ABC):
    """Coefficients of x_t = alpha(t) x0 + sigma(t) noise; a new path is these four functions of t (any shape)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha by t."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma by t."""

    def interpolate(self, noise: Tensor, x0: Tensor, t_b: Tensor) -> Tensor:
        """x_t (B, ...) between data `x0` (B, ...) and `noise` (B, ...) at the times `t_b` (B,)."""
        return _combine((self.alpha(t_b), self.sigma(t_b)), x0, noise)

    def target(self, prediction: Prediction, noise: Tensor, x0: Tensor, t_b: Tensor) -> Tensor:
        """What a network of this `prediction` should answer at x_t, (B, ...)."""
        return _combine(combination(self, prediction, t_b), x0, noise)

    def determinant(self, prediction: Prediction, t: Tensor) -> Tensor:
        """alpha b - sigma a: zero exactly where x_t and the prediction no longer determine x0 and noise."""
        a, b = combination(self, prediction, t)
        return self.alpha(t) * b - self.sigma(t) * a

    def conversion(self, t: Tensor, source: Prediction, target: Prediction) -> Combination:
        """Weights of x_t and of a prediction `source`, whose sum is the prediction `target`, in the shape of `t`.

        Solving alpha x0 + sigma noise = x_t and a x0 + b noise = value for (x0, noise) and combining them again gives
        ((c b - d a) x_t + (d alpha - c sigma) value) / (alpha b - sigma a) for a target c x0 + d noise.
        """
        (a, b), (c, d) = combination(self, source, t), combination(self, target, t)
        determinant = self.determinant(source, t)
        return (c * b - d * a) / determinant, (d * self.alpha(t) - c * self.sigma(t)) / determinant

    def convert(self, value: Tensor, x_t: Tensor, t_b: Tensor, source: Prediction, target: Prediction) -> Tensor:
        """Turn a prediction of kind `source` at `x_t` into one of kind `target`, by the weights of `conversion`.

        Args:
            value: (B, ...) the prediction.
            x_t: (B, ...) where it was made.
            t_b: (B,) when; `determinant(source, t_b)` must not be zero (eps at alpha = 0, x0 at sigma = 0).
            source: what `value` is.
            target: what is wanted.

        Returns:
            (B, ...); `value` itself where source and target are the same.
        """
        if source == target:
            return value
        return _combine(self.conversion(t_b, source, target), x_t, value)


class LinearFlow(Path):
    """alpha = 1 - t, sigma = t: the straight line of rectified flow.

    Liu, Gong, Liu, "Flow Straight and Fast", 2022, eq. 1, with time reversed: there t = 1 is data. Direction and
    weights are those of SiT's linear interpolant (Ma et al. 2024) and of SD3's rectified flow (Esser et al. 2024,
    sec. 3.1).
    """

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)


COMBINATIONS: dict[str, Callable[[Path, Tensor], Combination]] = {
    "velocity": lambda path, t: (path.d_alpha(t), path.d_sigma(t)),
    "x0": lambda _, t: (torch.ones_like(t), torch.zeros_like(t)),
    "eps": lambda _, t: (torch.zeros_like(t), torch.ones_like(t)),
    # Salimans & Ho 2022, appendix D, for any path: with x_t it determines x0 at every time, as alpha^2 + sigma^2 > 0.
    "v": lambda path, t: (-path.sigma(t), path.alpha(t)),
}


def combination(path: Path, prediction: Prediction, t: Tensor) -> Combination:
    """(a, b) of a prediction a x0 + b noise, each in the shape of `t`.

    Raises:
        BadInput: a prediction that is not in `COMBINATIONS`.
    """
    if prediction not in COMBINATIONS:
        raise BadInput(f"prediction: expected one of {', '.join(COMBINATIONS)}, got {prediction}")
    return COMBINATIONS[prediction](path, t)


def _combine(weights_b: Combination, first: Tensor, second: Tensor) -> Tensor:
    """Per-sample weighted sum of two (B, ...) tensors."""
    w_first, w_second = (w.view(-1, *[1] * (first.ndim - 1)) for w in weights_b)
    return w_first * first + w_second * second
