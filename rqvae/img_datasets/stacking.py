"""Samples put together into a batch, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.tensor_fields import TensorFields


@dataclass
class Named:
    """A value and the path of fields that led to it, for error messages."""

    name: str
    value: Any


def stacked(items: Sequence[Named]) -> Any:
    """Batch of values of one kind; see `default_collate_fn`."""
    first, values = items[0], [item.value for item in items]
    if any((v is None) != (first.value is None) for v in values):
        raise BadInput(f"{first.name}: expected in every sample of a batch or in none, got some of each")
    if first.value is None:
        return None
    if isinstance(first.value, Tensor):
        shapes = {tuple(v.shape) for v in values}
        if len(shapes) > 1:
            raise BadInput(f"{first.name}: expected one shape in a batch, got {sorted(shapes)}")
        return torch.stack(values)
    if isinstance(first.value, TensorFields):
        names = [f.name for f in fields(first.value)]  # type: ignore[arg-type]
        parts = {n: stacked([Named(f"{first.name}.{n}", getattr(v, n)) for v in values]) for n in names}
        return type(first.value)(**parts)
    if isinstance(first.value, dict):
        return {k: stacked([Named(f"{first.name}.{k}", v.get(k)) for v in values]) for k in first.value}
    if first.name.endswith((".num_classes", ".num_actions", ".encoded", ".cached")):
        return first.value
    return list(values)
