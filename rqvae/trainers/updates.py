"""One optimizer and what it minimises. A GAN is two of these in a list, not a branch in the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rqvae.backends import Backend, LossScaler
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.trainers.clock import Clock
from rqvae.trainers.schedules import Constant, Schedule


@dataclass
class StepLosses:
    """What one micro-batch gives.

    Args:
        total: scalar to minimise.
        parts: scalars to log.
        per_sample: (B,) loss of each sample, where there is one.
        t: (B,) diffusion time of each sample, where there is one.
    """

    total: Tensor
    parts: dict[str, Tensor]
    per_sample: Tensor | None = None
    t: Tensor | None = None


@dataclass(frozen=True)
class UpdateSettings:
    """An optimizer.

    Args:
        lr: learning rate of AdamW before the schedule's factor.
        betas: of AdamW.
        weight_decay: of AdamW.
        eps: of AdamW.
        clip: gradients are clipped to this norm, after their mean over ranks; null does not clip.
        schedule: factor of the learning rate over the run.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: float | None = 1.0
    schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise BadInput(f"lr: expected more than 0, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"betas: expected numbers in [0, 1), got {list(self.betas)}")
        if self.weight_decay < 0 or self.eps <= 0:
            raise BadInput(f"weight_decay, eps: expected >= 0 and > 0, got {self.weight_decay}, {self.eps}")
        if self.clip is not None and self.clip <= 0:
            raise BadInput(f"clip: expected more than 0 or null, got {self.clip}")


_SCALER = "loss_scaler"
MakeOptimizer = Callable[[Sequence[nn.Parameter], UpdateSettings], torch.optim.Optimizer]


def fused_adamw(params: Sequence[nn.Parameter], settings: UpdateSettings) -> torch.optim.Optimizer:
    """AdamW in one kernel; the plain one may read its step counter on the host."""
    return torch.optim.AdamW(
        params,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        fused=True,
    )


def adamw_of(backend: Backend) -> MakeOptimizer:
    """The backend's own AdamW."""

    def make(params: Sequence[nn.Parameter], settings: UpdateSettings) -> torch.optim.Optimizer:
        return backend.adamw(
            params, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    return make


@dataclass
class Update:
    """One optimizer, the module it trains and the loss it minimises.

    Args:
        name: in logs and checkpoints, for example `autoencoder`.
        module: the bare module; its trainable parameters are the update's.
        wrapped: the module whose backward averages gradients over ranks; what `loss` calls.
        loss: of a micro-batch and its number in the step.
        settings: optimizer settings.
        starts: first optimizer step (0 is the run's first) at which this update is done.
        make_optimizer: of its parameters.
        scaler: of the loss, in fp16.
    """

    name: str
    module: nn.Module
    wrapped: nn.Module
    loss: Callable[[LabeledImageData, int], StepLosses]
    settings: UpdateSettings
    starts: int = 0
    make_optimizer: MakeOptimizer = fused_adamw
    scaler: LossScaler | None = None
    params: list[nn.Parameter] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.params = [p for p in self.module.parameters() if p.requires_grad]
        if not self.params:
            raise BadInput(f"updates.{self.name}: {type(self.module).__name__} has no parameters to train")
        self.optimizer = self.make_optimizer(self.params, self.settings)

    def schedule(self, clock: Clock) -> float:
        """Set the learning rate of the step that `clock` is at, and return it."""
        lr = self.settings.lr * self.settings.schedule.factor(clock.step, clock)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def unscale(self) -> None:
        """Divide the gradients by the loss scale where there is one: from here on they are the loss's own."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)

    def figures(self, norm: Tensor) -> dict[str, Tensor]:
        """What a row of the log says of a step with gradients of this norm: scalars on the device."""
        return {"grad_norm": norm} | ({"loss_scale": self.scaler.value} if self.scaler else {})

    def parameter_of(self, name: str) -> nn.Parameter | None:
        """The parameter to which an entry of `state_dict` belongs."""
        return dict(self.module.named_parameters()).get(name.rpartition(".")[0])

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors, named `parameter.state` by the module's own parameter names; the scaler's."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        scale = self.scaler.state_dict() if self.scaler else {}
        return {f"{_SCALER}.{key}": value for key, value in scale.items()} | {
            f"{names[id(p)]}.{key}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the optimizer's tensors of a checkpoint; an empty dict belongs to an update that had not started.

        A loss scale begins anew where the checkpoint has none, and is left where this run needs none.
        """
        names = {name: p for name, p in self.module.named_parameters()}
        self.optimizer.state.clear()
        scale = {}
        for full, value in state.items():
            name, _, key = full.rpartition(".")
            if name == _SCALER:
                scale[key] = value
                continue
            p = names[name]
            # In the parameter's memory format and type: fused AdamW walks both memories side by side, so that a
            # contiguous moment beside a channels_last weight would be read permuted.
            self.optimizer.state[p][key] = torch.empty_like(p).copy_(value) if value.shape == p.shape else value.clone()
        if self.scaler and scale:
            self.scaler.load_state_dict(scale)


@contextlib.contextmanager
def only_grads(update: Update, among: Sequence[Update]) -> Iterator[None]:
    """Within this context only the parameters of `update` require gradients, among those that are trained."""
    for other in among:
        for p in other.params:
            p.requires_grad_(other is update)
    try:
        yield
    finally:
        for other in among:
            for p in other.params:
                p.requires_grad_(True)
