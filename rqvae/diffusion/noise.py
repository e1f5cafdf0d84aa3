"""Fresh noise for stochastic solvers that belongs to the sample, not to the batch, the rank or the device."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from rqvae.randomness import generator, normal

_KEY_VALUES = 16


class KeyedNoise:
    """Noise of step i as a function of i and of each sample's initial noise.

    So a sample stays a function of its initial noise alone under stochastic solvers too: the same in any batch, on any
    rank and device, without a second seed. The key is the sample's first 16 numbers in fp32; they are read back
    from the device once, at the first step that asks, and never by a deterministic solver.

    Args:
        initial: (B, ...) the noise that sampling starts from.
    """

    def __init__(self, initial: Tensor) -> None:
        self.initial = initial

    @cached_property
    def _keys(self) -> list[str]:
        """One key a sample."""
        values = self.initial.flatten(1)[:, :_KEY_VALUES].float().cpu()
        return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest() for row in values]

    def __call__(self, step: int) -> Tensor:
        """Standard normal numbers (B, ...), in the precision and on the device of the initial noise."""
        shape = tuple(self.initial.shape[1:])
        rows = [normal(shape, generator=generator("step noise", step, key)) for key in self._keys]
        return torch.stack(rows).to(self.initial)
