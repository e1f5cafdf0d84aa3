"""Which times a network is trained at, and which a sampler walks through. t = 0 is data, t = 1 is noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rqvae.errors import BadInput

# Half a step of torch.rand's grid, and the largest float32 below 1: the interval stays open in float32, where
# torch.rand can return 0 and a sigmoid saturates at 1.
_SMALLEST, _LARGEST = 2.0**-25, 1 - 2.0**-24


class TimestepLaw(ABC):
    """A distribution of training times, usable as the law of a `rqvae.randomness.Draw`."""

    @abstractmethod
    def __call__(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        """Times in the open interval (0, 1), float32, of `shape`, drawn from a host generator."""


@dataclass(frozen=True)
class Uniform(TimestepLaw):
    """Every time equally often."""

    def __call__(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        """See `TimestepLaw`."""
        return torch.rand(shape, generator=generator, device=generator.device).clamp_(_SMALLEST, _LARGEST)


@dataclass(frozen=True)
class LogitNormal(TimestepLaw):
    """sigmoid of a normal number: the middle of the path more often (Esser et al. 2024, SD3, eq. 19).

    Args:
        mean: location; positive means more noise.
        std: scale, > 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise BadInput(f"timesteps.std: expected a number > 0, got {self.std}")

    def __call__(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        """See `TimestepLaw`."""
        z = torch.randn(shape, generator=generator, device=generator.device)
        return torch.sigmoid(self.mean + self.std * z).clamp_(_SMALLEST, _LARGEST)


@dataclass(frozen=True)
class Shifted(TimestepLaw):
    """Another law moved towards noise, for larger images (Esser et al. 2024, SD3, eq. 23; `shift` is their sqrt(m/n)).

    Args:
        shift: > 0; above 1 towards noise, 1 changes nothing.
        base: the law that is moved.
    """

    shift: float = 3.0
    base: TimestepLaw = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_shift("timesteps.shift", self.shift)

    def __call__(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        """See `TimestepLaw`."""
        return shifted(self.base(shape, generator=generator), self.shift).clamp_(_SMALLEST, _LARGEST)


def shifted(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t), which keeps 0 and 1 (Esser et al. 2024, SD3, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(steps: int, shift: float = 1.0, start: float = 1.0) -> Tensor:
    """The times of a sampler from noise to data.

    Args:
        steps: >= 1.
        shift: > 0; above 1 spends more steps near the noise.
        start: the first time, in (0, 1].

    Returns:
        (steps + 1,) float64 on the host, from exactly `start` down to exactly 0, equally spaced before shifting.

    Raises:
        BadInput: steps < 1, shift <= 0 or start outside (0, 1].
    """
    if steps < 1:
        raise BadInput(f"sampler.steps: expected a whole number >= 1, got {steps}")
    _check_shift("sampler.shift", shift)
    if not 0 < start <= 1:
        raise BadInput(f"sampler.start: expected a number in (0, 1], got {start}")
    first = start / (shift + (1 - shift) * start)  # the inverse of `shifted`
    times = shifted(torch.linspace(first, 0, steps + 1, dtype=torch.float64, device="cpu"), shift)
    times[0] = start  # exactly, whatever the two shifts round to
    return times


def _check_shift(key: str, shift: float) -> None:
    if not shift > 0:
        raise BadInput(f"{key}: expected a number > 0, got {shift}")
