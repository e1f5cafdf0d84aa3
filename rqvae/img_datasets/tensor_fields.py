"""Dataclasses whose tensors move together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


def register_pytree(cls: type) -> type:
    """Register a dataclass of tensors as a pytree.

    An FSDP2 root whose output is an unregistered dataclass fails in backward, because its hooks cannot find the
    tensors; `torch.utils._pytree.register_dataclass` is the documented door since torch 2.7.
    """
    torch.utils._pytree.register_dataclass(cls)
    return cls


def _apply(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` on every tensor of nested dataclasses, dicts and lists; everything else is kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, TensorFields):
        return replace(value, **{f.name: _apply(getattr(value, f.name), change) for f in fields(value)})  # type: ignore[type-var,arg-type]
    if isinstance(value, dict):
        return {key: _apply(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_apply(item, change) for item in value]
    return value


class TensorFields:
    """Base of the dataclasses that hold tensors: they move themselves."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """All tensors on `device`; floating-point ones also in `dtype` if given. Integer tensors keep their type."""
        return _apply(self, lambda x: x.to(device, dtype if x.is_floating_point() else None, non_blocking=True))

    def pin_memory(self) -> Self:
        """All tensors in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return _apply(self, lambda x: x.pin_memory())
