"""Guidance: the velocity that is followed, made from a network's velocities under several conditions.

A new kind (interval guidance, autoguidance) is one class: it is called with the velocity function, x, the time as a
0-dim float64 host tensor (so it may skip a forward without a device read-back) and the condition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput

Velocity = Callable[[Tensor, Tensor, Any], Tensor]
"""`(x (B, ...), t 0-dim, condition of length B) -> velocity (B, ...)`."""


class Guidance(ABC):
    """From a velocity function to the velocity that a solver follows."""

    @property
    def needs_null(self) -> bool:
        """Whether the null condition is evaluated, so that the network must have been trained with it."""
        return False

    @abstractmethod
    def __call__(self, velocity: Velocity, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The guided velocity (B, ...) at x (B, ...), t (0-dim, host) under `condition` (length B)."""


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """null + scale (conditional - null), over all latent channels (Ho & Salimans 2022, eq. 6 with scale = 1 + w).

    Some public DiT code guides the first three channels of the latent only, for reproducibility of an old result;
    here every channel is guided. Both halves go through the network in one forward of 2 B.

    Args:
        scale: 1 is the conditional velocity alone, and costs no second half; 0 is the null one.
    """

    scale: float = 1.0

    @property
    def needs_null(self) -> bool:
        """True unless the scale is 1."""
        return self.scale != 1

    def __call__(self, velocity: Velocity, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """See `Guidance`.

        Raises:
            BadInput: a scale other than 1 without a condition.
        """
        if not self.needs_null:
            return velocity(x, t, condition)
        if condition is None:
            raise BadInput(f"condition: expected one for guidance of scale {self.scale:g}, got None")
        both = velocity(torch.cat((x, x)), t, joined(condition, condition.null()))
        conditional, null = both.chunk(2)
        return torch.lerp(null, conditional, self.scale)


def joined(first: Any, second: Any) -> Any:
    """Two conditions (dataclasses of one type, equal shapes) as one of twice the length; non-tensors from the first."""
    if not is_dataclass(first) or isinstance(first, type):
        raise TypeError(f"condition: expected a dataclass of tensors, got {type(first).__name__}")
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}
    return replace(first, **{k: torch.cat(p) for k, p in pairs.items() if isinstance(p[0], Tensor)})
