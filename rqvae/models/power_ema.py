"""Power-function averages of weights, and averages of other lengths put together from their snapshots afterwards.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C. Time
t counts optimizer steps, the first step ends at t = 1. An average of exponent g weighs the weights of moment s by

    p(s; g, t) = (g + 1) s^g / t^(g + 1)    for 0 <= s <= t, else 0,

so that its length is a fixed share of the run so far: sigma_rel, the standard deviation of p over t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from rqvae.errors import BadInput
from rqvae.models.ema import EMA

LONGEST = 1 / math.sqrt(12)
"""sigma_rel of the plain mean of all weights so far, exponent 0: the longest power-function average."""


def relative_width(exponent: float) -> float:
    """sigma_rel of an exponent of at least 0 (appendix C.1: the standard deviation of a Beta(g + 1, 1) variable)."""
    return math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))


def exponent_of(sigma_rel: float) -> float:
    """The exponent g >= 0 whose relative width is `sigma_rel`, in (0, 0.2886].

    sigma_rel^2 (g + 2)^2 (g + 3) = g + 1 is a cubic in g; its largest root is the one at or above 0.

    Raises:
        BadInput: a width outside the range.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise BadInput(f"sigma_rel: expected a number in (0, {LONGEST:.4f}], got {sigma_rel}")
    per_variance = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - per_variance, 12 - per_variance]).real.max()))


class PowerEMA(EMA):
    """An average of relative width `sigma_rel`: `average = b average + (1 - b) weights`, b(t) = (1 - 1/t)^(g + 1).

    b(1) = 0, so that the random start has no share in it and there is no warm-up to choose. A mean over unit steps of
    p above: the weights after step s count by the integral of p over [s - 1, s].

    Args:
        module: the uncompiled module; its parameters and floating-point buffers are followed.
        sigma_rel: in (0, 0.2886].
    """

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel, self.exponent = sigma_rel, exponent_of(sigma_rel)
        super().__init__(module, decay=0.0, warmup=False)

    @property
    def name(self) -> str:
        """The name in checkpoints, snapshots and `ema.evaluate`, for example `power_ema_0.05`."""
        return f"power_ema_{self.sigma_rel:g}"

    def share(self, step: int) -> float:
        """1 - b(step + 1); by logarithms, because 1 - (1 - 1/t)^(g + 1) loses digits at large t."""
        return 1.0 if step == 0 else -math.expm1((self.exponent + 1) * math.log1p(-1 / (step + 1)))


@dataclass(frozen=True)
class Profile:
    """Which moments of training an average holds.

    Args:
        exponent: of the power function, at least 0.
        t: optimizer steps done when the average was taken, at least 1.
    """

    exponent: float
    t: float


def overlap(a: Profile, b: Profile) -> float:
    """The integral of the two densities' product over time (appendix C.3), in closed form."""
    end = min(a.t, b.t)
    # the powers of end/t, never of t itself: 1e6 steps to the power of 97 (sigma_rel 0.01) is beyond float64
    shape = (end / a.t) ** (a.exponent + 1) * (end / b.t) ** (b.exponent + 1) / end
    return (a.exponent + 1) * (b.exponent + 1) / (a.exponent + b.exponent + 1) * shape


@dataclass(frozen=True)
class Combination:
    """Snapshots whose weighted sum is nearest to a wanted average.

    Args:
        coefficients: one a snapshot, in their order; their sum is near 1.
        profile_error: norm of (sum of profiles - wanted profile) over the norm of the wanted one; 0 is exact.
    """

    coefficients: tuple[float, ...]
    profile_error: float

    @property
    def noise_gain(self) -> float:
        """How much the snapshots' independent rounding errors grow: the norm of the coefficients."""
        return math.sqrt(sum(c * c for c in self.coefficients))


def combine(snapshots: Sequence[Profile], wanted: Profile) -> Combination:
    """The least-squares combination of appendix C.3: the profiles' sum nearest to `wanted` over all of time.

    The profiles are scaled to norm 1 first: neighbours in time are nearly equal, and the system nearly singular.
    """
    if not snapshots:
        raise BadInput("ema: expected at least one snapshot, got none")
    norms = np.array([math.sqrt(overlap(p, p)) for p in snapshots])
    target_norm = math.sqrt(overlap(wanted, wanted))
    gram = np.array([[overlap(p, q) for q in snapshots] for p in snapshots]) / np.outer(norms, norms)
    against = np.array([overlap(p, wanted) for p in snapshots]) / (norms * target_norm)
    scaled = np.linalg.lstsq(gram, against, rcond=1e-13)[0]
    rest = max(0.0, 1 - 2 * float(scaled @ against) + float(scaled @ gram @ scaled))
    return Combination(tuple(float(c) for c in scaled * target_norm / norms), math.sqrt(rest))
