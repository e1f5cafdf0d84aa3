"""Means of what micro-batches give, kept on the device until they are logged."""

from __future__ import annotations

import torch
from torch import Tensor

from rqvae.backends import Backend

_LEFT_OUT = " left out"


class Meter:
    """Sums and counts by name, on the device; reduced over ranks once a flush."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor], prefix: str = "train/", applied: Tensor | None = None) -> None:
        """One observation of each value (a scalar).

        Args:
            values: by name.
            prefix: of the names in the log.
            applied: scalar bool on the device; where false, the observation does not count.
        """
        for name, value in values.items():
            key = prefix + name
            # at least fp32: a sum of 500 ones stands still at 256 in bf16
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            if applied is not None:
                self._add(key + _LEFT_OUT, (~applied).to(value.dtype))
                value = torch.where(applied, value, torch.zeros_like(value))
            self._add(key, value)

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """The means over micro-batches and ranks, and forget them. Collective: every rank calls it.

        A value whose observations were all left out is NaN.
        """
        if not self.sums:
            return {}
        flat = self.backend.all_reduce(torch.stack(list(self.sums.values())), "mean")
        sums = dict(zip(self.sums, flat.unbind(), strict=True))
        means = {
            key: total / (self.counts[key] - sums.get(key + _LEFT_OUT, 0))
            for key, total in sums.items()
            if not key.endswith(_LEFT_OUT)
        }
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
