"""Variance-preserving paths: alpha^2 + sigma^2 = 1, the noise schedules of DDPM and of pixel diffusion.

A law is a turn from data to noise: alpha = cos phi(t), sigma = sin phi(t), and the speed phi'(t) gives both
derivatives. alpha and sigma are written down without phi, which would lose them to rounding where they are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rqvae.diffusion.paths import Path
from rqvae.errors import BadInput

LawName = Literal["linear", "cosine"]

DDPM_STEPS, DDPM_FIRST_BETA, DDPM_LAST_BETA = 1000, 1e-4, 0.02
# The rest of the series, beta^7 / 7 over 1,000 steps, is below 3e-11 of log alpha_bar.
_SERIES_TERMS = 6


class Law(NamedTuple):
    """alpha, sigma and the speed of the turn, each a function of t in [0, 1]."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    speed: Callable[[Tensor], Tensor]


class VP(Path):
    """A variance-preserving path, optionally shifted in log-SNR for larger images.

    `linear` is the discrete law of DDPM (Ho et al. 2020, section 4): 1,000 steps with beta_n from 1e-4 to 0.02 and
    alpha^2 = prod_{i <= n} (1 - beta_i). Step n of 1 ... 1,000 is t = n / 1000 (index n - 1 of the usual tables), and
    t = 0 is the data themselves; between the steps the sum of logarithms is continued smoothly. alpha(1) = 0.00635,
    not 0. Its velocity grows like 1 / sqrt(t) towards the data, so prefer `DDIM` or `dpm_solver_pp_2m` there.

    `cosine` is alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Salimans & Ho 2022; Hoogeboom et al. 2023), with exact
    ends. Nichol & Dhariwal 2021 add an offset of 0.008 to t, which discrete steps need and this does not.

    Args:
        law: linear or cosine.
        shift: > 0; sigma / alpha is multiplied by it, so log-SNR falls by 2 log(shift). For the "shifted" schedule of
            simple diffusion (Hoogeboom et al. 2023, section 3.1: log-SNR + 2 log(base / resolution), base 64) it is
            resolution / base, for example 4 at 256 pixels. 1 changes nothing; above 1 is towards noise, as in
            `rqvae.diffusion.timesteps.Shifted`.

    Raises:
        BadInput: an unknown law, or a shift that is not > 0.
    """

    def __init__(self, law: LawName = "cosine", shift: float = 1.0) -> None:
        if law not in LAWS:
            raise BadInput(f"path.law: expected one of {', '.join(LAWS)}, got {law}")
        if not shift > 0:
            raise BadInput(f"path.shift: expected a number > 0, got {shift}")
        self.law, self.shift = LAWS[law], shift

    def alpha(self, t: Tensor) -> Tensor:
        """cos phi; 1 at t = 0."""
        return self.law.alpha(t) / self._norm(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sin phi; 0 at t = 0."""
        return self.shift * self.law.sigma(t) / self._norm(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """-sin phi times the speed."""
        return -self.sigma(t) * self._speed(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """cos phi times the speed."""
        return self.alpha(t) * self._speed(t)

    def _norm(self, t: Tensor) -> Tensor:
        """Length of (alpha, shift sigma), which brings the shifted pair back to alpha^2 + sigma^2 = 1."""
        return torch.hypot(self.law.alpha(t), self.shift * self.law.sigma(t))

    def _speed(self, t: Tensor) -> Tensor:
        """Derivative of arctan(shift tan phi)."""
        return self.shift * self.law.speed(t) / self._norm(t).square()


def _ddpm_coefficients() -> list[float]:
    """Of t, t^2, ... in log alpha_bar(t), the smooth continuation of sum_{i <= 1000 t} log(1 - beta_i).

    The sum is the midpoint rule of an integral over u from 0 to n (the rest, by Euler and Maclaurin, is 1.7e-8
    at most), and log(1 - beta) = -(beta + beta^2 / 2 + ...) with beta linear in u: so it is a polynomial, which fp32
    evaluates without the cancellation of its closed forms.
    """
    step = (DDPM_LAST_BETA - DDPM_FIRST_BETA) / (DDPM_STEPS - 1)
    start, slope = DDPM_FIRST_BETA - step / 2, step * DDPM_STEPS
    return [
        -DDPM_STEPS
        / (j + 1)
        * sum(math.comb(k, j) * start ** (k - j) * slope**j / k for k in range(max(j, 1), _SERIES_TERMS + 1))
        for j in range(_SERIES_TERMS + 1)
    ]


_COEFFICIENTS = _ddpm_coefficients()


def _log_alpha_bar(t: Tensor) -> Tensor:
    """log alpha^2 of the DDPM law, by Horner's rule."""
    total = torch.zeros_like(t)
    for c in reversed(_COEFFICIENTS):
        total = (total + c) * t
    return total


def _d_log_alpha_bar(t: Tensor) -> Tensor:
    """Its derivative by t."""
    total = torch.zeros_like(t)
    for power, c in reversed(list(enumerate(_COEFFICIENTS, 1))):
        total = total * t + power * c
    return total


def _ddpm_alpha(t: Tensor) -> Tensor:
    return torch.exp(_log_alpha_bar(t) / 2)


def _ddpm_sigma(t: Tensor) -> Tensor:
    return torch.sqrt(-torch.expm1(_log_alpha_bar(t)))


def _ddpm_speed(t: Tensor) -> Tensor:
    """-alpha (log alpha)' / sin phi, as alpha = cos phi."""
    return -_ddpm_alpha(t) * _d_log_alpha_bar(t) / (2 * _ddpm_sigma(t))


def _sine(t: Tensor, *, of_rest: bool) -> Tensor:
    """sin(pi t / 2), or of 1 - t: cos(pi / 2) is 6e-17 in floating point where sin(0) is 0."""
    return torch.sin((1 - t if of_rest else t) * (math.pi / 2))


LAWS: dict[str, Law] = {
    "linear": Law(_ddpm_alpha, _ddpm_sigma, _ddpm_speed),
    "cosine": Law(
        partial(_sine, of_rest=True), partial(_sine, of_rest=False), lambda t: torch.full_like(t, math.pi / 2)
    ),
}
