"""The CPU backend: gloo between processes."""

from __future__ import annotations

import torch
from torch import nn

from rqvae.backends.compiling import check_host_compiler
from rqvae.backends.eager import EagerBackend
from rqvae.errors import BadInput


class CpuBackend(EagerBackend):
    """Processes on the host's cores."""

    name = "cpu"
    device_type = "cpu"
    process_group = "gloo"

    def choose_device(self, local_rank: int) -> torch.device:  # noqa: ARG002  (a CPU has no index)
        return torch.device("cpu")

    def compile(self, block: nn.Module) -> None:
        if self.compiler == "inductor":
            check_host_compiler()
            if self.dtype == torch.float64:
                # backward of attention: "expected scalar type Double but found Float" (torch 2.9.1, pytorch 185539)
                raise BadInput(f"train.precision: expected not {self.precision} with train.compile on a CPU")
        super().compile(block)
