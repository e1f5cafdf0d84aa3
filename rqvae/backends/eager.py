"""What the ordinary torch devices share: torch.distributed, DDP, autocast. A device is four names, see `cpu.py`."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity

from rqvae.backends.compiling import compile_in_place
from rqvae.backends.guarded import step_if_at_most
from rqvae.backends.interfaces import Movable, Precision, ReduceOp
from rqvae.backends.peaks import peak_tflops
from rqvae.backends.scaling import LossScaler
from rqvae.backends.sharded import clip_parts, only_last_reduces
from rqvae.processes import skip_teardown
from rqvae.shards import is_sharded

T = TypeVar("T")
_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}
_LEFT: list[dist.ProcessGroup | None] = []
"""Groups that were left, kept to the end of the process. Freeing one of gloo soon after a collective can hang in torch
2.7: the GIL is held while its lock is taken, which its thread holds while it waits for the GIL to free a tensor."""

_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class EagerBackend:
    """A process of a cpu, cuda or hpu job. Joins the group that the launcher's environment describes.

    Args:
        precision: fp32, bf16 or fp16 (autocast; weights fp32; fp16 with a scaled loss), or fp64.
        threads: OpenMP threads of this process, 0 to leave torch's choice.
        timeout: seconds after which a collective that a rank never joins is an error.
    """

    name: str
    device_type: str
    process_group: str
    pin_memory = False
    compiler = "inductor"
    widest_float = torch.float64
    fused_adamw = True
    bucket_cap_mb = 25
    options: tuple[str, ...] = ()
    _host_group: dist.ProcessGroup | None = None

    def __init__(self, precision: Precision = "fp32", threads: int = 0, timeout: float = 600.0) -> None:
        self.precision: Precision = precision
        self.dtype = _DTYPES[precision]
        if threads:
            torch.set_num_threads(threads)
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = self.choose_device(int(os.environ.get("LOCAL_RANK", 0)))
        if self.world_size > 1:
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group(self.process_group, timeout=limit)
            # What lives on the host stays there: objects, and sums in a type that the device may not have. It waits
            # long, as rank 0 may be writing 50,000 images or fetching data; the death of a rank is noticed at once.
            self._host_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))

    @classmethod
    def check_devices(cls, world_size: int) -> None:
        """Raise BadInput where this host has fewer devices than processes are to be started; cores are shared."""

    def choose_device(self, local_rank: int) -> torch.device:
        """This process's device."""
        return torch.device(self.device_type, local_rank)

    def compile(self, block: nn.Module) -> None:
        compile_in_place(block, self.compiler)

    @property
    def device_name(self) -> str:
        return platform.processor() or platform.machine()

    def peak_tflops(self) -> float | None:
        return peak_tflops(self.device_name, self.precision)

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU]

    def record_memory(self) -> None:
        """Nothing: the host's allocator keeps no history; the profiler's own events tell what it gave."""

    def write_memory(self, path: Path) -> bool:  # noqa: ARG002
        return False

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return module
        return DistributedDataParallel(
            module,
            None if self.device.index is None else [self.device.index],
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_cap_mb,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        compute = _COMPUTE.get(self.precision)
        return torch.autocast(self.device_type, dtype=compute, enabled=compute is not None)

    def feed(self, batches: Iterable[Movable]) -> Iterator[Any]:
        for batch in batches:
            yield batch.to(self.device, self.dtype)

    def accumulate(self, module: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        if isinstance(module, FSDPModule):
            return only_last_reduces(module, last=sync)
        if sync or not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        return module.no_sync()

    def loss_scaler(self) -> LossScaler | None:
        return LossScaler(self.device_type) if self.precision == "fp16" else None

    def backward(self, loss: Tensor, scaler: LossScaler | None = None) -> None:
        (scaler.scale(loss) if scaler else loss).backward()

    def reduce(self, params: Sequence[nn.Parameter]) -> None:
        """The last backward did it."""

    def adamw(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=self.fused_adamw)

    def clip_gradients(self, params: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients down to the norm `limit` where theirs is larger; the norm before it, a scalar."""
        return nn.utils.clip_grad_norm_(params, limit)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        *,
        clip: float | None,
        scaler: LossScaler | None = None,
        at_most: Tensor | None = None,
    ) -> Tensor:
        if is_sharded(params[0]):
            norm = clip_parts(self, params, clip)
        elif clip is None:
            norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        else:
            norm = self.clip_gradients(params, clip)
        if scaler:
            norm = scaler.step(optimizer, norm)
        elif at_most is not None:
            step_if_at_most(optimizer, norm, at_most)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def mark_step(self) -> None:
        """Nothing: an eager device has no graph to end."""

    def when_ready(self, fn: Callable[..., None], **tensors: Tensor) -> None:
        stacked = [t.detach().to(self.widest_float).reshape(()) for t in tensors.values()]
        fn(**dict(zip(tensors, torch.stack(stacked).tolist() if stacked else [], strict=True)))

    def when_read(self, fn: Callable[[Tensor], None], x: Tensor) -> None:
        fn(x.detach().cpu())

    def settle(self) -> None:
        """Nothing: `when_ready` holds nothing back."""

    def _group_of(self, x: Tensor) -> dist.ProcessGroup | None:
        """The host's processes for a tensor of the host, else (None) the device's."""
        return self._host_group if x.device.type == "cpu" else None

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        if self.world_size == 1:
            return x.detach().clone()
        x = x.detach().clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=self._group_of(x))
        return x / self.world_size if op == "mean" else x

    def all_gather(self, x: Tensor) -> Tensor:
        if self.world_size == 1:
            return x.detach()[None]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.detach().contiguous(), group=self._group_of(x))
        return torch.stack(parts)

    def not_finite(self, tensors: Sequence[Tensor]) -> list[bool]:
        flags = torch.stack([~value.detach().to(self.device).isfinite().all() for value in tensors])
        return self.all_reduce(flags.float(), "max").bool().tolist()

    def broadcast(self, value: T) -> T:
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._host_group)

    def seed(self, number: int) -> None:
        torch.manual_seed(number)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            _LEFT.extend((dist.group.WORLD, self._host_group))
            dist.destroy_process_group()
            skip_teardown()
