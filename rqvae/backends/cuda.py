"""The CUDA backend: one GPU a process, NCCL between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from rqvae.backends.eager import EagerBackend
from rqvae.backends.interfaces import Movable, Precision
from rqvae.backends.late_values import Event, LateValues
from rqvae.backends.prefetch import one_ahead
from rqvae.errors import BadInput

MEMORY_EVENTS = 100_000
"""Allocations and frees that a memory history holds; the oldest are dropped."""


class CudaBackend(EagerBackend):
    """Processes on NVIDIA GPUs.

    The host only gives work to the device: batches come from page-locked memory on a stream of their own, values for
    the log arrive later, and neither clipping nor the optimizer reads anything.
    """

    name = "cuda"
    device_type = "cuda"
    process_group = "nccl"
    pin_memory = True

    def __init__(self, precision: Precision = "fp32", threads: int = 0, timeout: float = 600.0) -> None:
        super().__init__(precision, threads, timeout)
        # TF32 for fp32 matrix products; convolutions have it by default. This one function only: torch 2.9 raises where
        # its `fp32_precision` settings and the older flags meet.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True  # shapes do not change: the fastest algorithm is looked for once
        self._late = LateValues(self._copy_to_host)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]

    def record_memory(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def write_memory(self, path: Path) -> bool:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        return True

    @classmethod
    def check_devices(cls, world_size: int) -> None:
        if not torch.cuda.is_available():
            raise BadInput("backend cuda: expected an NVIDIA GPU and a CUDA build of torch, found none")
        count = torch.cuda.device_count()
        if world_size > count:
            raise BadInput(f"--world-size: expected at most {count} (GPUs of this host), got {world_size}")

    def choose_device(self, local_rank: int) -> torch.device:
        self.check_devices(local_rank + 1)  # a rank of torchrun was started without our launcher's check
        if self.precision == "bf16" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(local_rank)
            raise BadInput(f"train.precision: expected fp16 or fp32 on {name}, which has no bf16, got bf16")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def feed(self, batches: Iterable[Movable]) -> Iterator[Any]:
        """The batches on the device; each is copied while the step before it computes.

        The copy waits for the work that was given to the device until then. So it may be given memory of an older
        batch, whose last use is part of that work, and no tensor needs `record_stream`.
        """
        copies = torch.cuda.Stream(self.device)

        def begin(batch: Movable) -> tuple[Any, torch.cuda.Event]:
            copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(copies):
                return batch.to(self.device, self.dtype), copies.record_event()

        def finish(begun: tuple[Any, torch.cuda.Event]) -> Any:
            batch, copied = begun
            torch.cuda.current_stream(self.device).wait_event(copied)
            return batch

        return one_ahead(batches, begin, finish)

    def when_ready(self, fn: Callable[..., None], **tensors: Tensor) -> None:
        self._late.add(fn, tensors)

    def when_read(self, fn: Callable[[Tensor], None], x: Tensor) -> None:
        self._late.add_whole(fn, x)

    def mark_step(self) -> None:
        """Read the values of the step before: this step's work, which the device has by now, keeps it busy."""
        self._late.deliver()

    def settle(self) -> None:
        self._late.deliver()

    @staticmethod
    def _copy_to_host(values_n: Tensor) -> tuple[Tensor, Event]:
        host_n = torch.empty(values_n.shape, dtype=values_n.dtype, pin_memory=True)
        host_n.copy_(values_n, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host_n, arrived
