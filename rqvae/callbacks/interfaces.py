"""What may watch a run (`Observer`: changes nothing) and what may act on it (`Intervention`: on every rank alike)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rqvae.durations import Duration
from rqvae.img_datasets.interfaces import LabeledImageData


class ClockView(Protocol):
    """The clock, to be read."""

    images: int
    batch_size: int
    total_steps: int

    @property
    def step(self) -> int: ...

    @property
    def epoch(self) -> float: ...

    def due(self, every: Duration) -> bool: ...


class UpdateView(Protocol):
    """One optimizer and its module."""

    name: str
    module: nn.Module
    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer


class LossView(Protocol):
    """The loss of a micro-batch: of each sample, and its diffusion time in [0, 1], where there are such; both (B,)."""

    @property
    def per_sample(self) -> Tensor | None: ...

    @property
    def t(self) -> Tensor | None: ...


class RunView(Protocol):
    """What observers see of a run. Collective methods are called by every rank or by none."""

    @property
    def clock(self) -> ClockView: ...

    @property
    def folder(self) -> Path: ...

    @property
    def is_main(self) -> bool: ...

    def log_scalars(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the row of the present step."""
        ...

    def log_groups(self, name: str, values_b: Tensor, group_b: Tensor, groups: int) -> None:
        """Add samples (B,) to the means `train/NAME_GROUP` of the row that comes next; see `Meter.add_groups`.

        `group_b` is (B,), the group of each sample, or (B, groups), its weight in the mean of each.
        """
        ...

    def ask(self, what: Literal["checkpoint", "stop"], why: str) -> None:
        """For interventions, on rank 0: have all ranks save, or stop without saving, before one of the next steps."""
        ...

    def log_picture(self, name: str, image_hwc: np.ndarray) -> None:
        """Show a picture (H, W, 3) uint8; written by rank 0."""
        ...

    def log_film(self, name: str, frames_thwc: np.ndarray, fps: float) -> None:
        """Show a film (T, H, W, 3) uint8; written by rank 0."""
        ...


class Observer:
    """Watches and changes nothing: a run with all observers and one with none end in the same weights, bit by bit."""

    def on_fit_start(self, run: RunView) -> None:
        """Before the first step of this process."""

    def before_step(self, run: RunView, micros: list[LabeledImageData]) -> None:
        """The batch is on the device."""

    def after_loss(self, run: RunView, update: UpdateView, micro: LabeledImageData, losses: LossView) -> None:
        """A micro-batch has its loss; its gradients are not there yet."""

    def after_backward(self, run: RunView, update: UpdateView) -> None:
        """Gradients are reduced and not yet clipped."""

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:
        """The clock has ticked; `losses` holds this step's scalars of this rank, on the device."""

    def on_fit_end(self, run: RunView) -> None:
        """After the last step of this process, also on error."""


class Stateful(Protocol):
    """What a checkpoint keeps of a callback."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Intervention:
    """Acts on weights or gradients; every rank takes the same decision, from reduced statistics."""

    def before_update(self, run: RunView, update: UpdateView) -> None:
        """Gradients are reduced and not yet clipped."""
