"""The only room that knows hardware. `create` makes this process's backend; `launch` starts the processes."""

from __future__ import annotations

import os

import torch

from rqvae.backends.cpu import CpuBackend
from rqvae.backends.cuda import CudaBackend
from rqvae.backends.eager import EagerBackend
from rqvae.backends.interfaces import Backend, Precision
from rqvae.backends.launch import in_job, launch
from rqvae.backends.scaling import LossScaler
from rqvae.errors import BadInput
from rqvae.processes import leave_with_parent

__all__ = ["Backend", "LossScaler", "Precision", "choose", "create", "in_job", "launch"]

_BACKENDS: dict[str, type[EagerBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend}


def choose(name: str | None = None) -> str:
    """The backend's name: `name`, else RQVAE_BACKEND, else cuda where a GPU is, else cpu.

    Raises:
        BadInput: a name that is none; an explicit choice is never replaced by another backend.
    """
    name = name or os.environ.get("RQVAE_BACKEND") or "auto"
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in _BACKENDS:
        raise BadInput(f"--backend: expected one of auto, {', '.join(_BACKENDS)}, got {name}")
    return name


def create(name: str | None = None, *, precision: Precision = "fp32", threads: int = 0) -> Backend:
    """This process's backend; joins the other processes of the job."""
    for name_of_variable in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name_of_variable) not in (None, "", "0"):
            # with it an fp32 average of decay 0.999 ends at 0.25 where 0.95 is right, and still calls itself float32
            raise BadInput(f"{name_of_variable}: expected to be unset (train.precision chooses bf16)")
    if in_job():
        leave_with_parent()
    return _BACKENDS[choose(name)](precision, threads)
