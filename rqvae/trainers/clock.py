"""Time in training, counted in images: steps, images, epochs and percent are views of one clock."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from rqvae.durations import Duration, DurationText, Unit
from rqvae.errors import BadInput


@dataclass
class Clock:
    """How far a run is. Its only state is the number of images consumed.

    Args:
        batch_size: images of one optimizer step, over all ranks and micro-batches.
        epoch_size: images of the train split.
        total_steps: length of the run; 0 until it is known.
        images: images consumed.
    """

    batch_size: int
    epoch_size: int
    total_steps: int = 0
    images: int = 0

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.images // self.batch_size

    @property
    def epoch(self) -> float:
        """Passes over the train split done."""
        return self.images / self.epoch_size

    def tick(self) -> None:
        """One optimizer step is done."""
        self.images += self.batch_size

    def position(self, unit: Unit, images: int) -> Fraction:
        """The moment `images` in `unit`, exactly."""
        if unit == "images":
            return Fraction(images)
        if unit == "epochs":
            return Fraction(images, self.epoch_size)
        steps = Fraction(images, self.batch_size)
        return steps if unit == "steps" else steps * 100 / self.total_steps

    def due(self, every: Duration) -> bool:
        """Whether the last step crossed a multiple of `every`, or was the last one of the run."""
        now = self.position(every.unit, self.images) // every.amount
        before = self.position(every.unit, self.images - self.batch_size) // every.amount
        return now > before or self.step == self.total_steps

    def steps_of(self, duration: Duration) -> int:
        """`duration` as a number of optimizer steps, rounded up."""
        if duration.unit == "percent" and not self.total_steps:
            raise BadInput(f"train.steps: expected steps, images or epochs, got {duration}")
        per_step = self.position(duration.unit, self.batch_size)
        return max(1, ceil(duration.amount / per_step))

    def starting_at(self, start: DurationText) -> int:
        """How many steps are done before something starts whose first step (counted from 1) is `start`; 0 is as 1."""
        return 0 if str(start).strip() == "0" else self.steps_of(Duration.parse(start)) - 1

    def state_dict(self) -> dict[str, Any]:
        """Everything to save: the images consumed (the rest comes from the config)."""
        return {"images": self.images, "step": self.step, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        if state["images"] % self.batch_size:
            raise BadInput(
                f"data.batch_size: expected a divisor of the checkpoint's {state['images']} images, "
                f"got {self.batch_size}"
            )
        self.images = state["images"]
