"""The only room that knows hardware. `create` makes this process's backend; `launch` starts the processes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from rqvae.backends import launch as torchrun
from rqvae.backends import xla_environment, xla_launch
from rqvae.backends.cpu import CpuBackend
from rqvae.backends.cuda import CudaBackend
from rqvae.backends.eager import EagerBackend
from rqvae.backends.hosts import host_count, max_restarts
from rqvae.backends.hpu import HpuBackend
from rqvae.backends.interfaces import Backend, Precision
from rqvae.backends.scaling import LossScaler
from rqvae.errors import BadInput
from rqvae.processes import leave_with_parent

__all__ = [
    "Backend",
    "LossScaler",
    "Precision",
    "choose",
    "create",
    "in_job",
    "job_size",
    "launch",
    "launched_at",
    "needs_launch",
]

_BACKENDS: dict[str, type[EagerBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend, "hpu": HpuBackend}
_OPTIONS = {name: backend.options for name, backend in _BACKENDS.items()} | {"xla": xla_environment.OPTIONS}


def choose(name: str | None = None) -> str:
    """The backend's name: `name`, else RQVAE_BACKEND, else what is found here.

    Looked for are a GPU (cuda), the vendor's package (hpu) and a TPU (xla); else it is cpu.

    A name may be followed by options of that backend, such as `hpu:lazy,fused` or `xla:spmd`.

    Raises:
        BadInput: a name or an option that is none; an explicit choice is never replaced by another backend.
    """
    name = name or os.environ.get("RQVAE_BACKEND") or "auto"
    if name == "auto":
        return _found_here()
    kind, _, options = name.partition(":")
    if kind not in _OPTIONS:
        raise BadInput(f"--backend: expected one of auto, {', '.join(_OPTIONS)}, got {name}")
    known = _OPTIONS[kind]
    if unknown := [option for option in options.split(",") if options and option not in known]:
        expected = f"options of {kind} among {', '.join(known)}" if known else f"no option for {kind}"
        raise BadInput(f"--backend {name}: expected {expected}, got {unknown[0]}")
    return name


def _found_here() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if importlib.util.find_spec("habana_frameworks") is not None:
        return "hpu"
    return "xla" if xla_environment.tpu_present() else "cpu"


def in_job() -> bool:
    """Whether a launcher (ours, torchrun, SLURM with torchrun) started this process as a rank of a job."""
    return torchrun.in_job() or xla_environment.JOB in os.environ


def job_size(world_size: int) -> int:
    """Processes of the whole job, with `world_size` on each of NNODES hosts.

    Raises:
        BadInput: NNODES is no number.
    """
    return world_size * host_count()


def launched_at() -> float | None:
    """When this process's launcher started, in seconds since 1970; None where ours has not started it."""
    return float(os.environ[torchrun.JOB_START]) if torchrun.JOB_START in os.environ else None


def needs_launch(world_size: int) -> bool:
    """Whether a command has to start processes: it is no process of a job, and one process is not all.

    Also where the one process is to be started anew after its death (RQVAE_MAX_RESTARTS).
    """
    return not in_job() and (world_size > 1 or host_count() > 1 or max_restarts() > 0)


def launch(arguments: Sequence[str], world_size: int, *, threads: int = 0, backend: str | None = None) -> int:
    """Run `python -m rqvae ARGUMENTS` on `world_size` devices of this host, as the backend wants it, and wait.

    Returns:
        The exit code: 0, or that of the rank that failed first; 128 + signal after a signal that ended the job.

    Raises:
        BadInput: more processes than devices; what the launchers raise.
    """
    name = choose(backend)
    kind, _, options = name.partition(":")
    if kind != "xla":
        _BACKENDS[kind].check_devices(world_size)
        return torchrun.launch(arguments, world_size, threads=threads, backend=name)
    xla_environment.take(options.split(","))
    return xla_launch.launch(arguments, world_size, threads=threads)


def create(name: str | None = None, *, precision: Precision = "fp32", threads: int = 0) -> Backend:
    """This process's backend; joins the other processes of the job."""
    for name_of_variable in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name_of_variable) not in (None, "", "0"):
            # with it an fp32 average of decay 0.999 ends at 0.25 where 0.95 is right, and still calls itself float32
            raise BadInput(f"{name_of_variable}: expected to be unset (train.precision chooses bf16)")
    if in_job():
        # On one host a rank whose launcher is gone still writes a checkpoint. Of several, the others would take the end
        # that it asks them for as an interruption, and not wait for this host to come back.
        leave_with_parent(save_first=int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1)
    kind, _, options = choose(name).partition(":")
    if kind == "xla":
        xla_environment.take(options.split(","))
        xla_environment.prepare()
        # here, and only where it is chosen: it must be imported before the first backward pass of the process
        try:
            from rqvae.backends import xla
        except ImportError as error:  # another torch than it was built for
            raise BadInput(f"backend xla: torch_xla cannot be imported: {' '.join(str(error).split())}") from error
        return xla.create(precision, threads)
    more: dict[str, Any] = {"options": options.split(",")} if options else {}
    return _BACKENDS[kind](precision, threads, **more)
