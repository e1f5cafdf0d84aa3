"""The one door to hardware.

cpu, cuda and hpu are ordinary torch devices and share `eager.py`; xla replaces launch, feed, reduce, step, mark_step,
when_ready and the collectives. No other room names a device, a vendor package or `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from rqvae.backends.scaling import LossScaler

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16", "fp64"]
ReduceOp = Literal["sum", "mean", "max"]


class Movable(Protocol):
    """A batch that moves itself."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Any: ...


class Backend(Protocol):
    """One process's view of its device and of the other processes.

    `pin_memory`: whether batches in page-locked memory reach the device faster.
    `widest_float`: the most precise floating-point type that the device computes in.
    """

    name: str
    device: torch.device
    rank: int
    world_size: int
    pin_memory: bool
    widest_float: torch.dtype

    @property
    def device_name(self) -> str:
        """What the device's driver, or the host, calls it."""
        ...

    def peak_tflops(self) -> float | None:
        """Dense peak of the device at the run's precision, in TFLOP/s; None where it is not known."""
        ...

    def profiler_activities(self) -> list[ProfilerActivity]:
        """What `torch.profiler` records of this device, the host included."""
        ...

    def record_memory(self) -> None:
        """Begin a history of allocations, where the device keeps one."""
        ...

    def write_memory(self, path: Path) -> bool:
        """End the history and write it as a pickled snapshot; False, and no file, where the device keeps none."""
        ...

    def compile(self, block: nn.Module) -> None:
        """Compile a block of a network in place, at its next call, as one graph.

        Call it after moving the weights to the device and before `wrap`.

        Raises:
            BadInput: the device has no compiler.
        """
        ...

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make the ranks' weights equal (rank 0's) and return the module whose backward averages gradients."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 or fp16 compute where the precision asks for it; weights, EMA and optimizer state keep their type."""
        ...

    def feed(self, batches: Iterable[Movable]) -> Iterator[Any]:
        """The batches, on the device, floating-point tensors in the run's type."""
        ...

    def accumulate(self, module: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch's forward and backward through a wrapped module: communicates only when `sync`.

        A context, not an argument of backward: DDP decides in forward whether the next backward will communicate.
        """
        ...

    def loss_scaler(self) -> LossScaler | None:
        """The scale of one update's loss where the precision needs one (fp16), else None."""
        ...

    def backward(self, loss: Tensor, scaler: LossScaler | None = None) -> None:
        """Add the loss's gradients, times the scale where there is one, to the parameters."""
        ...

    def reduce(self, params: Sequence[nn.Parameter]) -> None:
        """Gradients are the global mean from here on. Nothing to do where the last backward did it."""
        ...

    def adamw(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        """AdamW (Loshchilov & Hutter 2019) in the form that is best on the device.

        What it keeps between steps is in `optimizer.state` as tensors, so that a checkpoint has all of it.
        """
        ...

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        *,
        clip: float | None,
        scaler: LossScaler | None = None,
        at_most: Tensor | None = None,
    ) -> Tensor:
        """Clip (after reduce), update, clear the gradients; the gradient norm before clipping, on the device.

        Args:
            optimizer: whose gradients are reduced, and unscaled where there is a scaler.
            params: its parameters.
            clip: largest norm; None does not clip.
            scaler: that of the losses; it skips the update where their gradients overflowed.
            at_most: scalar; leave weights and optimizer as they are where the norm is not finite or more than this;
                decided on the device. Not with a scaler.
        """
        ...

    def mark_step(self) -> None:
        """End of one graph; nothing on eager devices."""
        ...

    def when_ready(self, fn: Callable[..., None], **tensors: Tensor) -> None:
        """Call `fn` with the values of tensors of one element as floats, without stalling the device.

        `fn` may be called later, in a `mark_step` or in `settle`; in the order of the calls in any case.
        """
        ...

    def when_read(self, fn: Callable[[Tensor], None], x: Tensor) -> None:
        """Call `fn` with a copy of `x` on the host, at the place where `when_ready` would call it; any shape."""
        ...

    def settle(self) -> None:
        """Wait for what `when_ready` holds back, and call it. What a function raises comes out here."""
        ...

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        """A new tensor: `x` reduced over ranks. Not differentiable.

        Args:
            x: on the device, or on the host (in any type, float64 too); the result is where x is.
            op: sum, mean or max.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """(world_size, ...) the ranks' tensors of one shape."""
        ...

    def not_finite(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Whether each tensor has an entry that is not finite, on any rank; with one reading from the device.

        Args:
            tensors: floating-point ones, on the device or on the host.
        """
        ...

    def broadcast(self, value: T) -> T:
        """Rank 0's value of a picklable object on every rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def seed(self, number: int) -> None:
        """Seed what modules draw themselves (dropout)."""
        ...

    def generator(self, seed: int) -> torch.Generator:
        """A seeded generator, on the device where that has any, else on the host."""
        ...

    def close(self) -> None:
        """Leave the group of processes."""
        ...
