"""The CUDA backend: one GPU a process, NCCL between processes."""

from __future__ import annotations

import torch

from rqvae.backends.eager import EagerBackend
from rqvae.errors import BadInput


class CudaBackend(EagerBackend):
    """Processes on NVIDIA GPUs."""

    name = "cuda"
    device_type = "cuda"
    process_group = "nccl"
    pin_memory = True

    def choose_device(self, local_rank: int) -> torch.device:
        if not torch.cuda.is_available():
            raise BadInput("backend cuda: expected an NVIDIA GPU and a CUDA build of torch, found none")
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"--world-size: expected at most {torch.cuda.device_count()} (GPUs of this host), got more")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
