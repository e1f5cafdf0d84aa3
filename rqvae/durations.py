"""Amounts of training as they are written in configs. A leaf: every room may import it, it imports only errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from rqvae.errors import BadInput

Unit = Literal["steps", "images", "epochs", "percent"]
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PATTERN = re.compile(r"^\s*(?P<number>\d+(?:\.\d+)?)(?P<factor>[kMG]?)\s*(?P<unit>steps?|images?|epochs?|%)?\s*$")


@dataclass(frozen=True)
class Duration:
    """An amount of training: `20k steps`, `5M images`, `0.5 epochs`, `10%` of the whole, or a bare integer (steps)."""

    amount: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: str | int) -> Duration:
        """Read a duration.

        Raises:
            BadInput: a text that is no duration, or not more than zero.
        """
        match = _PATTERN.match(str(text))
        if match is None:
            raise BadInput(f"expected a duration such as 500, 20k steps, 5M images, 0.5 epochs or 10%, got {text!r}")
        amount = Fraction(match["number"]) * _FACTORS[match["factor"]]
        unit = {"%": "percent", None: "steps"}.get(match["unit"]) or match["unit"].rstrip("s") + "s"
        if amount <= 0:
            raise BadInput(f"expected a duration of more than zero, got {text!r}")
        return cls(amount, unit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        number = str(self.amount) if self.amount.denominator == 1 else str(float(self.amount))
        return f"{number}%" if self.unit == "percent" else f"{number} {self.unit}"


DurationText = str | int
"""How a duration is written in a config; checked by `Duration.parse` when the config is read."""
