"""Learning-rate schedules: pure functions of the step, so that resuming restores them exactly without any state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rqvae.durations import Duration, DurationText
from rqvae.errors import BadInput
from rqvae.trainers.clock import Clock


class Schedule:
    """`factor(step, clock)` multiplies the optimizer's learning rate at optimizer step `step` (0 is the first)."""

    def factor(self, step: int, clock: Clock) -> float:
        """The factor of the learning rate."""
        raise NotImplementedError


def _check_warmup(warmup: DurationText) -> None:
    if str(warmup).strip() != "0":
        try:
            Duration.parse(warmup)
        except BadInput as error:
            raise BadInput(f"schedule.warmup: {error}") from None


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise BadInput(f"{name}: expected a number in [0, 1], got {value}")


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant rate after a linear warm-up.

    Args:
        warmup: duration of the warm-up, or 0.
    """

    warmup: DurationText = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)

    def factor(self, step: int, clock: Clock) -> float:
        return _warmup(step, self.warmup, clock)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` times the rate at the last step.

    Args:
        warmup: duration of the warm-up, or 0.
        final: fraction of the rate that is left at the end.
    """

    warmup: DurationText = "5%"
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        _check_fraction("schedule.final", self.final)

    def factor(self, step: int, clock: Clock) -> float:
        start = _steps(self.warmup, clock)
        if step < start:
            return (step + 1) / start
        progress = min(1.0, (step - start) / max(1, clock.total_steps - 1 - start))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Smith & Topin 2018: up from `1 / div_factor` by a cosine, then down to `1 / (div_factor * final_div_factor)`.

    Equal to `torch.optim.lr_scheduler.OneCycleLR` with `cycle_momentum=False` and `max_lr` = the optimizer's rate.

    Args:
        pct_start: fraction of the run that goes up.
        div_factor: the first rate is the highest divided by this.
        final_div_factor: the last rate is the first divided by this.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        _check_fraction("schedule.pct_start", self.pct_start)
        if self.div_factor <= 0 or self.final_div_factor <= 0:
            raise BadInput(
                f"schedule.div_factor, final_div_factor: expected more than 0, got {self.div_factor}, "
                f"{self.final_div_factor}"
            )

    def factor(self, step: int, clock: Clock) -> float:
        first, last = 1 / self.div_factor, 1 / (self.div_factor * self.final_div_factor)
        peak, end = self.pct_start * clock.total_steps - 1, clock.total_steps - 1
        if step <= peak:
            return _cosine(first, 1.0, step / peak if peak > 0 else 1.0)
        return _cosine(1.0, last, (step - peak) / (end - peak))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def _steps(duration: DurationText, clock: Clock) -> int:
    return 0 if str(duration).strip() == "0" else clock.steps_of(Duration.parse(duration))


def _warmup(step: int, duration: DurationText, clock: Clock) -> float:
    steps = _steps(duration, clock)
    return min(1.0, (step + 1) / steps) if steps else 1.0
