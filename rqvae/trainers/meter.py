"""Means of what micro-batches give, kept on the device until they are logged."""

from __future__ import annotations

import torch
from torch import Tensor

from rqvae.backends import Backend


class Meter:
    """Sums and counts by name, on the device; reduced over ranks once a flush."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor], prefix: str = "train/") -> None:
        """One observation of each value (a scalar)."""
        for name, value in values.items():
            key = prefix + name
            # at least fp32: a sum of 500 ones stands still at 256 in bf16
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """The means over micro-batches and ranks, and forget them. Collective: every rank calls it."""
        if not self.sums:
            return {}
        flat = self.backend.all_reduce(torch.stack(list(self.sums.values())), "mean")
        means = {key: flat[i] / self.counts[key] for i, key in enumerate(self.sums)}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The unfinished sums and counts, for a checkpoint between two rows. Collective: every rank calls it.

        The sums become their mean over ranks on every rank, now as after a resume, so that both add up alike.
        """
        self.sums = {key: self.backend.all_reduce(value, "mean") for key, value in sorted(self.sums.items())}
        return dict(self.sums), dict(self.counts)

    def load_state(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on with unfinished sums."""
        self.sums, self.counts = {key: value.clone() for key, value in sums.items()}, dict(counts)
