"""Means of what micro-batches give, kept on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.backends import Backend

_LEFT_OUT = " left out"
_SUM = " sum"


@dataclass(frozen=True)
class Window:
    """The sums of one row of the log, whose means are made on the host once their values are there.

    Args:
        backend: for the mean over ranks.
        sums: (1,) on the device, by name.
        counts: observations in each sum, the same on every rank.
    """

    backend: Backend
    sums: dict[str, Tensor]
    counts: dict[str, int]

    @property
    def names(self) -> set[str]:
        """What `means` adds to a row."""
        return {key for key in self.sums if not key.endswith(_LEFT_OUT)}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is to be read from the device, under names that are no row's."""
        return {key + _SUM: value for key, value in self.sums.items()}

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """The means over micro-batches and ranks, and those of `values` that are no sums. Collective.

        A value whose observations were all left out is NaN.
        """
        others = {key: value for key, value in values.items() if not key.endswith(_SUM)}
        if not self.sums:
            return others
        own = torch.tensor([values[key + _SUM] for key in self.sums], dtype=torch.float64)
        sums = dict(zip(self.sums, self.backend.all_reduce(own, "mean").tolist(), strict=True))
        counted = {key: self.counts[key] - sums.get(key + _LEFT_OUT, 0.0) for key in self.sums if key in self.names}
        return {key: sums[key] / count if count else math.nan for key, count in counted.items()} | others


class Meter:
    """Sums and counts by name, on the device; reduced over ranks once a flush."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._zeros: dict[str, Tensor] = {}

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
        if key not in self._zeros:
            # from the host, kept, and with an axis (a scalar 0 is not data to every compiler): a graph that begins a
            # row is then the same as one that goes on with it
            self._zeros[key] = torch.zeros(1, dtype=value.dtype).to(value.device)
        self.sums[key] = self.sums.get(key, self._zeros[key]) + value
        self.counts[key] = self.counts.get(key, 0) + 1

    def take(self) -> Window:
        """What has been observed since the last call, and forget it."""
        window = Window(self.backend, self.sums, self.counts)
        self.sums, self.counts = {}, {}
        return window

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The unfinished sums and counts, for a checkpoint between two rows. Collective: every rank calls it.

        The sums become their mean over ranks on every rank, now as after a resume, so that both add up alike.
        """
        self.sums = {key: self.backend.all_reduce(value, "mean") for key, value in sorted(self.sums.items())}
        return dict(self.sums), dict(self.counts)

    def load_state(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on with unfinished sums."""
        self.sums, self.counts = {key: value.clone() for key, value in sums.items()}, dict(counts)
