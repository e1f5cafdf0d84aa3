"""The CPU backend: gloo between processes."""

from __future__ import annotations

import torch

from rqvae.backends.eager import EagerBackend


class CpuBackend(EagerBackend):
    """Processes on the host's cores."""

    name = "cpu"
    device_type = "cpu"
    process_group = "gloo"

    def choose_device(self, local_rank: int) -> torch.device:  # noqa: ARG002  (a CPU has no index)
        return torch.device("cpu")
