"""The CUDA backend: one GPU a process, NCCL between processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from rqvae.backends.eager import EagerBackend
from rqvae.errors import BadInput

MEMORY_EVENTS = 100_000
"""Allocations and frees that a memory history holds; the oldest are dropped."""


class CudaBackend(EagerBackend):
    """Processes on NVIDIA GPUs."""

    name = "cuda"
    device_type = "cuda"
    process_group = "nccl"
    pin_memory = True

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

    def choose_device(self, local_rank: int) -> torch.device:
        if not torch.cuda.is_available():
            raise BadInput("backend cuda: expected an NVIDIA GPU and a CUDA build of torch, found none")
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"--world-size: expected at most {torch.cuda.device_count()} (GPUs of this host), got more")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
