"""The XLA backend: TPUs, and for tests the host's cores. Imported only when it is chosen.

A step is traced, compiled once and run as one program, so nothing in it may be read. In replica mode a process has one
device (on a host without TPU: a thread has one) and the ranks' gradients are averaged here; in SPMD mode one process
drives all devices, the program is that of the whole batch, and there is one rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_map

from rqvae.backends import xla_environment, xla_kernels
from rqvae.backends.guarded import step_if_at_most
from rqvae.backends.interfaces import Movable, Precision, ReduceOp
from rqvae.backends.lazy_adamw import LazyAdamW
from rqvae.backends.peaks import peak_tflops
from rqvae.backends.scaling import LossScaler
from rqvae.backends.thread_feed import fetched_ahead
from rqvae.errors import BadInput

T = TypeVar("T")
_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
_BLOCK = 1024
"""Numbers in a message between ranks, at least; most objects of `broadcast` need one message."""
_KERNELS = xla_kernels.register()
_LOCK = threading.Lock()
_MEETINGS: dict[int, threading.Barrier] = {}


def _meeting(replicas: int) -> threading.Barrier:
    """The place where the replicas of this process wait for each other."""
    with _LOCK:
        return _MEETINGS.setdefault(replicas, threading.Barrier(replicas))


class XlaBackend:
    """A replica of a job, or in SPMD mode the job.

    Environment: RQVAE_XLA_SPMD=1 chooses SPMD mode, RQVAE_XLA_CACHE=FOLDER keeps compiled programs (TPU only).

    Args:
        precision: fp32, bf16 (autocast; weights fp32) or fp64.
        threads: OpenMP threads of this process, 0 to leave torch's choice.

    Raises:
        BadInput: fp16, which XLA's devices have no use for.
    """

    name = "xla"
    pin_memory = False

    def __init__(self, precision: Precision = "fp32", threads: int = 0) -> None:
        if precision not in _DTYPES:
            raise BadInput(f"train.precision: expected fp32, bf16 or fp64 with the xla backend, got {precision}")
        self.precision: Precision = precision
        self.dtype = _DTYPES[precision]
        self.widest_float = torch.float64 if xla_environment.on_host() else torch.float32
        if threads:
            torch.set_num_threads(threads)
        self._mesh = self._use_spmd() if xla_environment.spmd() else None
        self.device = torch_xla.device()
        launched = xla_environment.JOB in os.environ and self._mesh is None
        self.rank, self.world_size = (xr.global_ordinal(), xr.world_size()) if launched else (0, 1)
        self._meeting = _meeting(xr.addressable_device_count() if launched else 1)
        self._in_step = False
        self._waiting: list[tuple[Callable[..., None], dict[str, Tensor]]] = []

    @staticmethod
    def _use_spmd() -> xs.Mesh:
        xr.use_spmd()
        if xr.process_count() > 1:
            raise BadInput(
                f"{xla_environment.SPMD}: expected one host, got {xr.process_count()}; replicas take several"
            )
        devices = xr.global_runtime_device_count()
        return xs.Mesh(np.arange(devices), (devices,), ("data",))

    @property
    def device_name(self) -> str:
        """`TPU v4` by TPU_ACCELERATOR_TYPE (v4-8, v5litepod-4), which hosts of TPUs set; else XLA and its platform."""
        kind = os.environ.get("TPU_ACCELERATOR_TYPE", "").partition("-")[0].replace("litepod", " lite")
        return f"TPU {kind}" if kind else f"XLA:{xr.device_type()}"

    def peak_tflops(self) -> float | None:
        return peak_tflops(self.device_name, self.precision)

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU]

    def record_memory(self) -> None:
        """Nothing: the device's allocator keeps no history that torch could read."""

    def write_memory(self, path: Path) -> bool:  # noqa: ARG002
        return False

    def compile(self, block: nn.Module) -> None:  # noqa: ARG002
        raise BadInput("train.compile: expected false with the xla backend, which compiles whole steps in any case")

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world_size > 1:
            # as data: a number in the code that differs between ranks would give each its own program
            mine = xla_kernels.data_of(float(self.rank == 0), torch.float32, self.device)
            with torch.no_grad():
                for value in (*module.parameters(), *module.buffers()):
                    value.copy_(self._reduced(value * mine.to(value.dtype), "sum"))
            self._run()
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast("xla", dtype=torch.bfloat16)

    def feed(self, batches: Iterable[Movable]) -> Iterator[Any]:
        """The batches on the device, fetched by a thread of their own.

        Not torch_xla's MpDeviceLoader: an error of the dataset ends its loop as if the data had come to their end.
        """
        return fetched_ahead(batches, self._place)

    def _place(self, batch: Movable) -> Any:
        # the cast on the host: on the device it would become part of the program that is being traced meanwhile
        batch = batch.to("cpu", self.dtype)
        return batch.to(self.device) if self._mesh is None else tree_map(self._split, batch)

    def _split(self, value: Any) -> Any:
        """A tensor on all devices, its first axis divided among them; a batch's other fields as they are."""
        assert self._mesh is not None
        if hasattr(value, "to") and not isinstance(value, Tensor):
            raise TypeError(f"{type(value).__name__}: expected a batch that is registered as a pytree")
        if not isinstance(value, Tensor):
            return value
        axes = ("data", *[None] * (value.ndim - 1)) if value.ndim else ()
        sharding = xs.ShardingSpec(self._mesh, axes)
        return xm.send_cpu_data_to_device([value], self.device, sharding)[0]  # type: ignore[index]

    @contextlib.contextmanager
    def accumulate(self, module: nn.Module, *, sync: bool) -> Iterator[None]:  # noqa: ARG002  (`reduce` communicates)
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def loss_scaler(self) -> LossScaler | None:
        return None

    def backward(self, loss: Tensor, scaler: LossScaler | None = None) -> None:
        assert scaler is None
        loss.backward()

    def reduce(self, params: Sequence[nn.Parameter]) -> None:
        """One all-reduce of all gradients, and not in place.

        `xm.reduce_gradients`, which is in place, leaves some gradients as they were on each rank when they are the sum
        of several backward passes and are clipped in the same program: those of LayerNorm, GroupNorm and Linear,
        measured with torch_xla 2.9 on 2 replicas.
        """
        if self.world_size == 1:
            return
        params = [p for p in params if p.grad is not None]
        flat = self._reduced(torch.cat([p.grad.flatten() for p in params if p.grad is not None]), "mean")
        for p, gradient in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = gradient.view_as(p)

    def adamw(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        return LazyAdamW(params, lr, betas, eps, weight_decay)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        *,
        clip: float | None,
        scaler: LossScaler | None = None,
        at_most: Tensor | None = None,
    ) -> Tensor:
        assert scaler is None
        if clip is None:
            norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(params, clip)
        if at_most is not None:
            step_if_at_most(optimizer, norm, at_most)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def mark_step(self) -> None:
        """Run what has been traced; what `when_ready` holds back is read while the device is at work on it."""
        self._run()
        self.settle()

    def _run(self) -> None:
        """Run what has been traced; every rank calls it.

        Replicas that are threads meet before it, since XLA on the host gives up on a collective after 10 s, and go one
        at a time: each would otherwise compile a program of its own, and collectives of different programs never meet.
        Where a replica is a process neither costs anything.
        """
        self._meeting.wait()
        with _LOCK:
            torch_xla.sync()

    def when_ready(self, fn: Callable[..., None], **tensors: Tensor) -> None:
        self._waiting.append((fn, {name: value.detach() for name, value in tensors.items()}))

    def when_read(self, fn: Callable[[Tensor], None], x: Tensor) -> None:
        x = x.detach()
        self.when_ready(lambda: fn(x.cpu()))

    def settle(self) -> None:
        while self._waiting:
            fn, tensors = self._waiting.pop(0)
            fn(**{name: float(value.cpu()) for name, value in tensors.items()})

    def _reduced(self, x: Tensor, op: ReduceOp) -> Tensor:
        """`x` over ranks, as a part of what is being traced."""
        kind = xm.REDUCE_MAX if op == "max" else xm.REDUCE_SUM
        reduced = xm.all_reduce(kind, x, scale=1 / self.world_size if op == "mean" else 1.0)
        assert isinstance(reduced, Tensor)  # as one was given, not a list
        return reduced

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        """A part of the step's program within `accumulate`; a program of its own elsewhere, none with one rank."""
        x = x.detach()
        if self._in_step:
            return x.clone() if self.world_size == 1 else self._reduced(x, op)
        if self.world_size == 1:
            return x.cpu().clone().to(x.device)
        if x.device.type == "cpu":
            return self._reduced_of_host(x, op)
        reduced = self._reduced(x, op)
        self._run()
        return reduced

    def _reduced_of_host(self, x: Tensor, op: ReduceOp) -> Tensor:
        """Padded to a block, or to a power of two: each length would be a program to be compiled."""
        padded = torch.zeros(max(_BLOCK, 1 << (x.numel() - 1).bit_length()), dtype=x.dtype)
        padded[: x.numel()] = x.flatten()
        total = self._reduced(padded.to(self.device), "max" if op == "max" else "sum")
        self._run()
        total = total.cpu()[: x.numel()].view_as(x)
        return total / self.world_size if op == "mean" else total

    def all_gather(self, x: Tensor) -> Tensor:
        if self.world_size == 1:
            return x.detach()[None]
        parts = xm.all_gather(x.detach().to(self.device)[None], pin_layout=False)
        self._run()
        return parts.to(x.device)

    def not_finite(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Looked at on the host, where a checkpoint's tensors go anyway: no program, and none to compile."""
        flags = [float(not value.detach().cpu().isfinite().all()) for value in tensors]
        # a sum in float64, as the mean of a row: the same program
        return (self.all_reduce(torch.tensor(flags, dtype=torch.float64)) > 0).tolist()

    def broadcast(self, value: T) -> T:
        if self.world_size == 1:
            return value
        own = np.frombuffer(pickle.dumps(value) if self.rank == 0 else b"", np.uint8).astype(np.int32)
        first = np.zeros(_BLOCK, np.int32)
        first[0], head = len(own), own[: _BLOCK - 1]
        first[1 : 1 + len(head)] = head
        first = self._sum(first)
        size = int(first[0])
        data = first[1 : 1 + size]
        if size > len(data):
            rest = np.zeros(size, np.int32)
            rest[: len(own)] = own
            data = self._sum(rest)
        return pickle.loads(data.astype(np.uint8).tobytes())

    def _sum(self, numbers: np.ndarray) -> np.ndarray:
        return self.all_reduce(torch.from_numpy(numbers)).numpy()

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1))

    def seed(self, number: int) -> None:
        torch_xla.manual_seed(number)

    def generator(self, seed: int) -> torch.Generator:
        """On the host: the device has no generators."""
        return torch.Generator().manual_seed(seed)

    def close(self) -> None:
        """Nothing: a replica leaves by its end."""


def create(precision: Precision, threads: int) -> XlaBackend:
    """This process's, or thread's, backend; with a cache of compiled programs where RQVAE_XLA_CACHE names a folder.

    Raises:
        BadInput: a cache without a TPU; other hardware than the environment promises.
    """
    promised, found = os.environ["PJRT_DEVICE"], xr.device_type()
    if found != promised.partition("_")[0]:
        raise BadInput(f"backend xla: expected PJRT_DEVICE={promised}, torch_xla found {found}")
    if folder := os.environ.get(xla_environment.CACHE):
        if xla_environment.on_host():
            # torch_xla 2.9 writes the files there, and cannot read them again
            raise BadInput(f"{xla_environment.CACHE}: expected to be unset without a TPU")
        xr.initialize_cache(folder)
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns whenever a precision is chosen
    torch_xla.backends.set_mat_mul_precision(xla_environment.matmul())
    return XlaBackend(precision, threads)
