"""Weights, gradients, moments and averages split over the processes: FSDP2 (`train.parallel: sharded`).

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel"; the second form of it, in which a
parameter is split along its first dimension and stays a parameter under its own name (Liang et al. 2024, "TorchTitan",
section 2.1.1).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rqvae.backends.interfaces import Backend, Precision
from rqvae.errors import BadInput
from rqvae.shards import is_sharded, own_part

_BACKENDS = ("cpu", "cuda", "hpu")
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROUNDED_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_ROUNDED: weakref.WeakKeyDictionary[nn.Module, torch.dtype] = weakref.WeakKeyDictionary()
"""Modules of which some blocks are gathered in 16 bits."""


def check_parameters(module: nn.Module, world_size: int) -> None:
    """Raise BadInput where a parameter cannot be split, naming it."""
    for name, parameter in module.named_parameters():
        if world_size > 1 and parameter.ndim == 0:
            owner = type(module).__name__
            raise BadInput(f"train.parallel: expected data for {owner}, whose {name} is a scalar, got sharded")


def shard(backend: Backend, module: nn.Module, blocks: Sequence[nn.Module], precision: Precision) -> nn.Module:
    """Split a module's parameters over all processes, in place, after rank 0's weights were given to all.

    Each block is gathered whole just before it computes and let go after it, in forward and in backward; what is in no
    block, likewise with the module. Call it on the device, after recomputation and compilation of the blocks. A single
    process holds everything already: nothing is done.

    The module is not let stand gathered after its forward, as FSDP2 does with a root: a forward without backward (the
    GAN's second one) would leave its named parameters whole, and the next average that is swapped in unread.

    Args:
        backend: cpu, cuda or hpu.
        module: with contiguous parameters of one type.
        blocks: of the module; may be empty.
        precision: of the run.

    Raises:
        BadInput: a backend without it; a scalar parameter.
    """
    if backend.name not in _BACKENDS:
        raise BadInput(f"train.parallel: expected data on backend {backend.name}, got sharded")
    if backend.world_size == 1:
        return module
    check_parameters(module, backend.world_size)
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(backend.device.type, (backend.world_size,))
    wanted = {id(block) for block in blocks} - {id(module)}
    for inner in reversed(list(module.modules())):  # inner blocks first: a group takes what no other one has
        if id(inner) in wanted and any(True for _ in inner.parameters()):
            policy = _policy(inner, precision)
            if policy.param_dtype is not None:
                _ROUNDED[module] = policy.param_dtype
            fully_shard(inner, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    own_class = type(module)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # it is of a subclass now, whose name stands in no config and would be told in logs and checkpoints
    type(module).__name__, type(module).__qualname__ = own_class.__name__, own_class.__qualname__
    return module


def _policy(block: nn.Module, precision: Precision) -> MixedPrecisionPolicy:
    """Gather in 16 bits what autocast rounds to them anyway: half the traffic and the same numbers.

    That is a block all of whose weights are of linear layers and convolutions. Norms and tables compute in fp32 under
    autocast, and FSDP2 has one type a group. Gradients are summed over ranks in fp32.
    """
    compute = _COMPUTE.get(precision)
    owners = [m for m in block.modules() if any(True for _ in m.parameters(recurse=False))]
    if compute is None or not all(isinstance(owner, _ROUNDED_BY_AUTOCAST) for owner in owners):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextlib.contextmanager
def only_last_reduces(module: FSDPModule, *, last: bool) -> Iterator[None]:
    """Around one micro-batch: gradients stay whole and local until the last one, whose backward reduces their sum."""
    module.set_requires_gradient_sync(last)
    yield


def clip_parts(backend: Backend, params: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale split gradients down to the norm `limit`, as `nn.utils.clip_grad_norm_`; None only measures. Collective.

    On the parts themselves, with one collective. torch's own function on split gradients rounds the factor to fp32
    whatever their type (1e-7 in fp64, torch 2.9.1).

    Returns:
        The norm of the whole gradients before, the same bits on every rank.
    """
    parts = [own_part(p.grad) for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(backend.all_gather(nn.utils.get_total_norm(parts)))
    if limit is not None:
        torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Methods other than `forward` compute inside: what is in no block stays whole; blocks are gathered as in forward.

    Every rank calls it, and calls the blocks equally often. A forward of the module must have been before it: FSDP2
    takes the first module that computes for the outermost one. A module that is not split is left alone. Blocks that
    are gathered in 16 bits compute under autocast here as in training.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.set_reshard_after_forward(False, recurse=False)
    module.unshard()
    device_type = next(module.parameters()).device.type
    rounded = _ROUNDED.get(module)
    try:
        with torch.autocast(device_type, dtype=rounded, enabled=rounded is not None):
            yield
    finally:
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor, a sum over ranks included; one that is not split as it is. Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_on_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole of split tensors, one after another, on the host. Collective: every rank calls it.

    Args:
        tensors: by name; those that are not split stay as they are.
        keep: on the rank that needs them; the others get an empty dict.
    """
    gathered_tensors = {}
    for name, value in tensors.items():
        full = whole(value.detach()).cpu() if is_sharded(value) else value
        if keep:
            gathered_tensors[name] = full
    return gathered_tensors


def split_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, split as `like` is, on its device. No communication."""
    assert isinstance(like, DTensor)
    on_device = full.to(like.to_local().device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
