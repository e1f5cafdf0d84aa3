"""Loss scaling for fp16, whose smallest number is 6e-8 (Micikevicius et al. 2018, "Mixed Precision Training", 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

START = 2.0**16
"""The scale before the first step, that of `torch.amp.GradScaler`."""


class LossScaler:
    """The scale of one update's loss: halved by a step whose gradients overflow, doubled after 2000 without.

    Such a step changes neither weights nor the optimizer's state. Each update (autoencoder, discriminator) has its own,
    as an overflow of one says nothing of the other. With several ranks the gradients are already their mean, in which
    one rank's infinity stays, so all ranks skip the same steps. Nothing is read on the host but in `state_dict`.

    Args:
        device_type: of the gradients, for example `cuda`.
        start: the scale before the first step.
        growth_interval: steps without overflow before the scale doubles.
    """

    def __init__(self, device_type: str, start: float = START, growth_interval: int = 2000) -> None:
        self._scaler = torch.amp.GradScaler(device_type, init_scale=start, growth_interval=growth_interval)
        self._one = torch.ones((), device=device_type)

    @property
    def value(self) -> Tensor:
        """The present scale, a new fp32 scalar on the device."""
        return self._scaler.scale(self._one)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the present scale."""
        return self._scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of the optimizer's parameters by the present scale; clip them after it."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> Tensor:
        """Update the weights unless the unscaled gradients overflowed, then the scale.

        Args:
            optimizer: a fused one, which takes the decision on the device.
            norm: of the unscaled gradients, scalar.

        Returns:
            The norm; 0 where a step was skipped and the scale was at least 1: that is part of the method, not a fault.
            With a smaller scale it is a fault, since the gradients are then not finite whatever the scale is, and the
            norm says so.
        """
        excused = ~norm.isfinite() & (self.value >= 1)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm.masked_fill(excused, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """`scale` and `good_steps` (since the scale changed last), scalars on the host."""
        state = self._scaler.state_dict()
        return {"scale": torch.tensor(state["scale"]), "good_steps": torch.tensor(state["_growth_tracker"])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of a checkpoint."""
        values = {"scale": float(state["scale"]), "_growth_tracker": int(state["good_steps"])}
        self._scaler.load_state_dict(self._scaler.state_dict() | values)
