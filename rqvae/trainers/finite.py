"""Whether tensors are finite, known on every rank alike with one reading from the device."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rqvae.backends import Backend
from rqvae.shards import own_part


def first_not_finite(backend: Backend, groups: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """`GROUP:TENSOR` of the first tensor that is not finite on any rank, or None. Collective: every rank calls it."""
    named = {
        f"{group}:{key}": own_part(value)
        for group, tensors in groups.items()
        for key, value in tensors.items()
        if value.is_floating_point()
    }
    if not named:
        return None
    bad = backend.not_finite(list(named.values()))
    return next((name for name, flag in zip(named, bad, strict=True) if flag), None)
