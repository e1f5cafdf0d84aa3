"""Means of what micro-batches give, kept on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.backends import Backend

_LEFT_OUT = " left out"
_SUM = " sum"
_GROUPS = " groups"


@dataclass(frozen=True)
class Window:
    """The sums of one row of the log, whose means are made on the host once their values are there.

    Args:
        backend: for the mean over ranks.
        sums: (1,) on the device, by name; of groups (2, G), sums and numbers of samples.
        counts: observations in each sum, the same on every rank.
    """

    backend: Backend
    sums: dict[str, Tensor]
    counts: dict[str, int]

    @property
    def names(self) -> set[str]:
        """What `means` adds to a row."""
        means = {key for key in self.sums if not key.endswith((_LEFT_OUT, _GROUPS))}
        return means | {name for key in self.sums for name in self._groups(key)}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is to be read from the device, under names that are no row's."""
        return {key + _SUM: value for key, value in self._scalars()}

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """The means over micro-batches and ranks, and those of `values` that are no sums. Collective.

        A value whose observations were all left out is NaN; a group that had no sample has no value.
        """
        others = {key: value for key, value in values.items() if not key.endswith(_SUM)}
        if not self.sums:
            return others
        keys = [key for key, _ in self._scalars()]
        own = torch.tensor([values[key + _SUM] for key in keys], dtype=torch.float64)
        sums = dict(zip(keys, self.backend.all_reduce(own, "mean").tolist(), strict=True))
        counted = {key: self.counts[key] - sums.get(key + _LEFT_OUT, 0.0) for key in self.sums if key in self.names}
        means = {key: sums[key] / count if count else math.nan for key, count in counted.items()}
        for key in self.sums:
            names = self._groups(key)
            for g, name in enumerate(names):
                if samples := sums[f"{key} {len(names) + g}"]:
                    means[name] = sums[f"{key} {g}"] / samples
        return means | others

    def _groups(self, key: str) -> list[str]:
        """What a row calls the groups of a sum; none for another sum."""
        name, mark, _ = key.partition(_GROUPS)
        return [f"{name}_{g}" for g in range(self.sums[key].shape[1])] if mark else []

    def _scalars(self) -> Iterator[tuple[str, Tensor]]:
        for key, value in self.sums.items():
            if key.endswith(_GROUPS):
                yield from ((f"{key} {i}", x) for i, x in enumerate(value.flatten().split(1)))
            else:
                yield key, value


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

    def add_groups(self, name: str, values_b: Tensor, group_b: Tensor, groups: int, prefix: str = "train/") -> None:
        """One observation of each sample (B,), whose mean over a group the row has as `NAME_GROUP`.

        Args:
            name: of the values.
            values_b: (B,).
            group_b: (B,) integers in [0, groups); or (B, groups) >= 0, a sample's weight in the mean of each group.
            groups: how many there are.
            prefix: of the names in the log.
        """
        values_b = values_b.detach().to(torch.promote_types(values_b.dtype, torch.float32))
        if group_b.dim() == 1:
            group_b = group_b[:, None] == torch.arange(groups, device=group_b.device)
        weight_bg = group_b.to(values_b.dtype)
        # where, as a NaN times 0 would be in the sums of all groups
        sums_g = torch.where(weight_bg > 0, weight_bg * values_b[:, None], torch.zeros_like(weight_bg)).sum(0)
        self._add(f"{prefix}{name}{_GROUPS}", torch.stack([sums_g, weight_bg.sum(0)]))

    def _add(self, key: str, value: Tensor) -> None:
        if key not in self._zeros:
            # from the host, kept, and with an axis (a scalar 0 is not data to every compiler): a graph that begins a
            # row is then the same as one that goes on with it
            self._zeros[key] = torch.zeros(value.shape or 1, dtype=value.dtype).to(value.device)
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
