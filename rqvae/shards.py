"""Tensors of which each process holds a part (`train.parallel: sharded`), known without what splits them."""

from __future__ import annotations

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether this process holds only a part of the tensor; its shape is then still that of the whole one."""
    return hasattr(x, "to_local")


def own_part(x: Tensor) -> Tensor:
    """What this process holds of a tensor: the memory itself, without gradients. It may have no elements."""
    x = x.detach()
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]
