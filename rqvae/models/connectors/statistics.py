"""Mean and standard deviation of each latent channel in one pass, over any number of batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rqvae.errors import BadInput


def channel_axis(shape: tuple[int, ...]) -> int:
    """Where the channels of a latent are, counted from the end: (C, h, w) first, (L, C) last.

    Args:
        shape: without the batch axis.
    """
    return -3 if len(shape) == 3 else -1


class ChannelStatistics:
    """Count, mean and centred sum of squares of each channel, float64 on the host; grows by batches, merges over ranks.

    Values are centred before they are squared (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances"): E[x^2] - E[x]^2 loses all digits when a channel's offset is large
    against its spread.
    """

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean_c: Tensor | None = None
        self.m2_c: Tensor | None = None

    def update(self, zs: Tensor, valid_b: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            zs: (B, C, h, w) or (B, L, C).
            valid_b: (B,) bool, False for samples that only fill up the last batch; None counts all.
        """
        zs = zs.detach().to("cpu", torch.float64)
        if valid_b is not None:
            zs = zs[valid_b.to("cpu", torch.bool)]
        values_cn = zs.movedim(channel_axis(zs.shape[1:]), 0).flatten(1)
        mean_c = values_cn.mean(1) if values_cn.shape[1] else values_cn.new_zeros(len(values_cn))
        self.merge(values_cn.shape[1], mean_c, (values_cn - mean_c[:, None]).square().sum(1))

    def merge(self, count: int, mean_c: Tensor, m2_c: Tensor) -> None:
        """Add `count` values per channel of which mean (C,) and centred sum of squares (C,) are known, float64."""
        if self.mean_c is None or self.m2_c is None:
            self.mean_c, self.m2_c = torch.zeros_like(mean_c), torch.zeros_like(m2_c)
        if count == 0:
            return
        total = self.count + count
        share = count / total
        difference_c = mean_c - self.mean_c
        self.m2_c = self.m2_c + m2_c + difference_c.square() * self.count * share
        self.mean_c = self.mean_c + difference_c * share
        self.count = total

    def reduced(self, all_reduce: Callable[[Tensor], Tensor]) -> tuple[int, Tensor, Tensor]:
        """Statistics over all ranks, the same on each.

        Two sums suffice, as each rank's squares can be moved to the common mean once that is known. A rank whose
        samples were all invalid takes part; one that never saw a batch cannot, as it knows no number of channels.

        Args:
            all_reduce: sums a float64 host tensor over the ranks; `lambda x: x` on one.

        Returns:
            Values per channel, mean (C,) and std (C,, over count and not count - 1), float64 on the host.

        Raises:
            BadInput: no batch on this rank, or no valid sample on any.
        """
        if self.mean_c is None or self.m2_c is None:
            raise BadInput("latents: expected at least one batch on every rank to take statistics of, got none")
        sums = all_reduce(torch.cat((self.count[None], self.count * self.mean_c)))
        count, mean_c = int(sums[0]), sums[1:] / sums[0]
        if count == 0:
            raise BadInput("latents: expected at least one sample to take statistics of, got none")
        m2_c = all_reduce(self.m2_c + self.count * (self.mean_c - mean_c).square())
        return count, mean_c, (m2_c / count).sqrt()


def channel_statistics(latents: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Count, mean (C,) and std (C,) of a stream of latents on one rank; see `ChannelStatistics`.

    Raises:
        BadInput: no sample at all.
    """
    statistics = ChannelStatistics()
    for zs in latents:
        statistics.update(zs)
    return statistics.reduced(lambda x: x)
