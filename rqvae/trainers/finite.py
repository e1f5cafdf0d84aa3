"""Whether tensors are finite, known on every rank alike with one reading from the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rqvae.backends import Backend


def first_not_finite(backend: Backend, groups: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """`GROUP:TENSOR` of the first tensor that is not finite on any rank, or None. Collective: every rank calls it."""
    named = {
        f"{group}:{key}": value.detach().to(backend.device)
        for group, tensors in groups.items()
        for key, value in tensors.items()
        if value.is_floating_point()
    }
    if not named:
        return None
    flags = torch.stack([~value.isfinite().all() for value in named.values()]).float()
    bad = backend.all_reduce(flags, "max").tolist()
    return next((name for name, flag in zip(named, bad, strict=True) if flag), None)
