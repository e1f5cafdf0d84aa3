"""Durations, the clock and the schedules."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from rqvae.durations import Duration
from rqvae.errors import BadInput
from rqvae.trainers.clock import Clock
from rqvae.trainers.schedules import Constant, OneCycle, WarmupCosine


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        (500, 500, "steps"), ("20k steps", 20_000, "steps"), ("5M images", 5_000_000, "images"),
        ("0.5 epochs", Fraction(1, 2), "epochs"), ("10%", 10, "percent"), ("1 epoch", 1, "epochs"),
        ("1.5k", 1500, "steps"),
    ],
)  # fmt: skip
def test_durations_are_read(text: str | int, amount: Fraction, unit: str) -> None:
    assert Duration.parse(text) == Duration(Fraction(amount), unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "soon", "-3 steps", "0", "5 minutes", "1e3"])
def test_no_durations(text: str) -> None:
    with pytest.raises(BadInput, match="duration"):
        Duration.parse(text)


def ticks(clock: Clock, every: str) -> list[int]:
    due = []
    while clock.step < clock.total_steps:
        clock.tick()
        if clock.due(Duration.parse(every)):
            due.append(clock.step)
    return due


@pytest.mark.parametrize(
    ("every", "expected"),
    [("4 steps", [4, 8, 10]), ("50 images", [7, 10]), ("0.5 epochs", [3, 5, 8, 10]), ("25%", [3, 5, 8, 10])],
)
def test_due_when_a_multiple_is_crossed_and_at_the_end(every: str, expected: list[int]) -> None:
    assert ticks(Clock(batch_size=8, epoch_size=40, total_steps=10), every) == expected


def test_due_survives_any_number_of_images_exactly() -> None:
    """Three epochs of 1/3 as floats would drift; fractions do not."""
    clock = Clock(batch_size=3, epoch_size=9, total_steps=10**6)
    clock.images = 3 * (10**6 - 1) - 3
    clock.tick()
    assert clock.due(Duration.parse("1 epochs")) is True


def lrs(scheduler: torch.optim.lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize(("steps", "pct"), [(20, 0.3), (137, 0.1), (1000, 0.5)])
def test_one_cycle_equals_torch(steps: int, pct: float) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.1)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=steps, pct_start=pct, cycle_momentum=False
    )
    clock = Clock(8, 80, steps)
    ours = [0.1 * OneCycle(pct_start=pct).factor(k, clock) for k in range(steps)]
    assert ours == pytest.approx(lrs(reference, optimizer, steps), rel=1e-12)


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99, eta_min=0.01)
    ours = [0.1 * WarmupCosine(warmup=0, final=0.1).factor(k, Clock(8, 80, 100)) for k in range(100)]
    assert ours == pytest.approx(lrs(reference, optimizer, 100), rel=1e-9)


def test_warmup_is_linear() -> None:
    clock = Clock(8, 80, 100)
    assert [Constant(warmup=4).factor(k, clock) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
