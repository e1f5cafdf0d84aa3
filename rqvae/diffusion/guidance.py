"""Guidance: the prediction that is followed, made from predictions under several conditions or of several networks.

It works on what the network answers, whatever that is: at one (x, t) every kind of prediction is an affine function of
every other, and the weights here have sum 1, so that guiding velocities, eps or x0 is the same.

A new kind is one class: it is called with the prediction function, x, the time as a 0-dim float64 host tensor (so it
may skip a forward without a device read-back) and the condition. All latent channels are guided.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput

Predict = Callable[[Tensor, Tensor, Any], Tensor]
"""`(x (B, ...), t 0-dim, condition of length B) -> prediction (B, ...)`, one kind of prediction throughout."""


class Guidance(ABC):
    """From a prediction function to the prediction that a solver follows."""

    @property
    def needs_null(self) -> bool:
        """Whether the null condition is evaluated, so that the network must have been trained with it."""
        return False

    @abstractmethod
    def __call__(self, predict: Predict, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The guided prediction (B, ...) at x (B, ...), t (0-dim, host) under `condition` (length B)."""


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """null + scale (conditional - null), over all latent channels (Ho & Salimans 2022, eq. 6 with scale = 1 + w).

    Some public DiT code guides the first three channels of the latent only, for reproducibility of an old result;
    here every channel is guided. Both halves go through the network in one forward of 2 B.

    Args:
        scale: 1 is the conditional prediction alone, and costs no second half; 0 is the null one.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    @property
    def needs_null(self) -> bool:
        """True unless the scale is 1."""
        return self.scale != 1

    def __call__(self, predict: Predict, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """See `Guidance`.

        Raises:
            BadInput: a scale other than 1 without a condition.
        """
        if not self.needs_null:
            return predict(x, t, condition)
        if condition is None:
            raise BadInput(f"condition: expected one for guidance of scale {self.scale:g}, got None")
        both = predict(torch.cat((x, x)), t, joined(condition, condition.null()))
        conditional, null = both.chunk(2)
        return torch.lerp(null, conditional, self.scale)


@dataclass(frozen=True)
class Interval(ClassifierFree):
    """Classifier-free guidance at start < t <= end only (Kynkäänniemi et al. 2024, "limited interval").

    Outside, the conditional prediction is followed and the null half is not evaluated: B rows instead of 2 B.

    Args:
        scale: inside the interval, as in `ClassifierFree`.
        start: its end towards the data, in [0, 1).
        end: its end towards the noise, in (start, 1].
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.end <= 1:
            raise BadInput(f"guidance: expected 0 <= start < end <= 1, got start {self.start}, end {self.end}")

    def __call__(self, predict: Predict, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """See `ClassifierFree`."""
        if self.start < t <= self.end:
            return super().__call__(predict, x, t, condition)
        return predict(x, t, condition)


@dataclass(frozen=True)
class Autoguidance(Guidance):
    """guide + scale (model - guide), with a weaker version of the model as guide (Karras et al. 2024,
    "Guiding a Diffusion Model with a Bad Version of Itself").

    Each network sees the B rows once, under the same condition: no null half is made and thrown away.

    Args:
        guide: a smaller or less trained model, for example `LatentDiffusion.predictor` of it; it must answer the same
            kind of prediction on the same path.
        scale: 1 is the model alone, and the guide is not evaluated.
    """

    guide: Predict
    scale: float = 2.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, predict: Predict, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """See `Guidance`."""
        prediction = predict(x, t, condition)
        if self.scale == 1:
            return prediction
        return torch.lerp(self.guide(x, t, condition), prediction, self.scale)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise BadInput(f"guidance: scale: expected a finite number, got {scale}")


def joined(first: Any, second: Any) -> Any:
    """Two conditions (dataclasses of one type, equal shapes) as one of twice the length; non-tensors from the first."""
    if not is_dataclass(first) or isinstance(first, type):
        raise TypeError(f"condition: expected a dataclass of tensors, got {type(first).__name__}")
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}
    return replace(first, **{k: torch.cat(p) for k, p in pairs.items() if isinstance(p[0], Tensor)})
