"""Mean and covariance of a stream of features, in float64 on the host, summed over ranks without gathering features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from rqvae.errors import BadInput

# Products of 512 rows at a time: those of 125 rows took twice as long at 2048 features (two CPU cores, float64).
BUFFER_ROWS = 512


def as_floats(name: str, value: Any) -> Tensor:
    """Real numbers as a float64 tensor of the host.

    Args:
        name: what an error calls them.
        value: tensor of any device, array of any byte order and strides, or lists; of integers or any float type.

    Raises:
        BadInput: complex numbers, booleans, or no numbers at all.
    """
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise BadInput(f"{name}: expected an array of numbers: {error}") from error
        if array.dtype.kind not in "fiu":
            raise BadInput(f"{name}: expected real numbers, got {array.dtype}")
        array = np.asarray(array, np.float64, order="C")
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    # Copying complex numbers to float64 would leave out the imaginary part with no more than a warning.
    if value.is_complex() or value.dtype == torch.bool:
        raise BadInput(f"{name}: expected real numbers, got {value.dtype}")
    return value.detach().to("cpu", torch.float64)


def as_rows(name: str, features: Any) -> Tensor:
    """Features as a finite (N, D) float64 tensor of the host.

    Args:
        name: what an error calls them.
        features: (N, D) array or tensor of any float type on any device.

    Raises:
        BadInput: another shape or type, or a number that is not finite.
    """
    dtype = features.dtype if isinstance(features, Tensor | np.ndarray) else None
    rows = as_floats(name, features)
    counted = isinstance(dtype, torch.dtype) and not dtype.is_floating_point
    if rows.ndim != 2 or counted or (isinstance(dtype, np.dtype) and dtype.kind != "f"):
        raise BadInput(f"{name}: expected floats (N, D), got {dtype} {tuple(rows.shape)}")
    # A sum is finite only if all its terms are, and needs no memory; a look at each of them as much as they take.
    if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise BadInput(f"{name}: expected finite numbers, row {bad} has NaN or infinity")
    return rows


class StreamingStatistics:
    """Number, mean and covariance of feature vectors that are seen once, in memory of two D x D matrices.

    Sums are taken of x - shift, where the shift is the mean of the first rows: for features of mean 1e4 and deviation 1
    raw float64 sums lose 8 digits of the covariance, these lose none. Two objects are merged, and ranks are reduced, by
    re-centring sums of each on a common shift (Chan, Golub, LeVeque 1979, eq. 2.1b, with a shift that is not the mean).

        statistics = StreamingStatistics(2048)
        for batch in batches:
            statistics.update(features(batch))
        statistics.reduce(backend.all_reduce, expected=50_000)
        statistics.mean, statistics.cov

    Args:
        dim: D, features of a vector.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise BadInput(f"StreamingStatistics: expected dim >= 1, got {dim}")
        self.dim = dim
        self._n = 0
        self._shift = torch.zeros(dim, dtype=torch.float64)
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        # One buffer, written again and again: with a new one each time the allocator's holes grew by 65 MiB in 45 000
        # vectors of 2048 features.
        self._buffer: Tensor | None = None
        self._waiting = 0

    @property
    def n(self) -> int:
        """Vectors seen."""
        return self._n + self._waiting

    @property
    def mean(self) -> Tensor:
        """(D,) float64.

        Raises:
            BadInput: nothing was seen.
        """
        self._flush()
        self._require(1)
        return self._shift + self._sum / self._n

    @property
    def cov(self) -> Tensor:
        """(D, D) float64, symmetric, of n - 1 degrees of freedom as in `numpy.cov`.

        Raises:
            BadInput: fewer than two vectors were seen.
        """
        self._flush()
        self._require(2)
        scatter = self._scatter - torch.outer(self._sum, self._sum / self._n)
        return (scatter + scatter.mT) / (2 * (self._n - 1))

    def update(self, features: Any) -> Self:
        """Add vectors.

        Args:
            features: (N, D) array or tensor, any float type, any device; N may be 0.

        Raises:
            BadInput: another shape, or a number that is not finite; nothing was added then.
        """
        rows = as_rows("features", features)
        if rows.shape[1] != self.dim:
            raise BadInput(f"features: expected (N, {self.dim}), got {tuple(rows.shape)}")
        while len(rows):
            if self._buffer is None:
                self._buffer = torch.empty(BUFFER_ROWS, self.dim, dtype=torch.float64)
            free = self._buffer[self._waiting :]
            part, rows = rows[: len(free)], rows[len(free) :]
            free[: len(part)] = part
            self._waiting += len(part)
            if self._waiting == BUFFER_ROWS:
                self._multiply(self._buffer)
        return self

    def merge(self, other: StreamingStatistics) -> Self:
        """Add what another object saw, which stays as it is.

        Raises:
            BadInput: it has another dim.
        """
        self._check_dim(other)
        self._flush()
        other._flush()
        if not self._n:
            self._shift = other._shift.clone()
        total, scatter = other._about(self._shift)
        self._n += other._n
        self._sum += total
        self._scatter += scatter
        return self

    def without(self, part: StreamingStatistics) -> StreamingStatistics:
        """Statistics of what this object saw and `part`, which was merged into it, did not; for the jackknife.

        Raises:
            BadInput: another dim, or more vectors than this object has.
        """
        self._check_dim(part)
        self._flush()
        part._flush()
        if part._n > self._n:
            raise BadInput(f"without: expected a part of the {self._n} vectors, got {part._n}")
        rest = StreamingStatistics(self.dim)
        total, scatter = part._about(self._shift)
        rest._n, rest._shift = self._n - part._n, self._shift.clone()
        rest._sum, rest._scatter = self._sum - total, self._scatter - scatter
        return rest

    def reduce(self, all_reduce: Callable[[Tensor], Tensor], expected: int | None = None) -> Self:
        """Statistics of all ranks, on every rank; collective.

        Two all-reduces: of n and the sums (D + 1 numbers), which gives every rank the mean of all, and of the matrix of
        sums about that mean. No rank's own shift is special, so a rank without a single vector may be any of them.

        Args:
            all_reduce: sum of a float64 tensor of the host over the ranks, returned on each.
            expected: how many vectors all ranks together must have seen.

        Raises:
            BadInput: not `expected` vectors, as when a sampler repeats samples to fill up a batch.
        """
        self._flush()
        # What this mean is off by is no error of the result: it is only a shift, and the sums about it are exact.
        counted = torch.cat([self._sum + self._n * self._shift, torch.tensor([float(self._n)], dtype=torch.float64)])
        counted = all_reduce(counted)
        n = round(float(counted[-1]))
        if expected is not None and n != expected:
            raise BadInput(f"statistics: expected features of {expected} images over all ranks, got {n}")
        shift = counted[:-1] / max(n, 1)
        total, scatter = self._about(shift)
        sums = all_reduce(torch.cat([total[None], scatter]))
        self._n, self._shift, self._sum, self._scatter = n, shift, sums[0].clone(), sums[1:].clone()
        return self

    def _about(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of x - shift, and of its outer products."""
        if not self._n:
            return torch.zeros_like(self._sum), torch.zeros_like(self._scatter)
        move = self._shift - shift
        cross = torch.outer(move, self._sum)
        return self._sum + self._n * move, self._scatter + cross + cross.mT + self._n * torch.outer(move, move)

    def _flush(self) -> None:
        """Add what waits, and give the buffer back: a jackknife keeps many of these objects."""
        if self._buffer is not None:
            self._multiply(self._buffer[: self._waiting])
        self._buffer = None

    def _multiply(self, rows: Tensor) -> None:
        """Add the rows that wait; they are shifted in place."""
        self._waiting = 0
        if not len(rows):
            return
        if not self._n:
            self._shift = rows.mean(0)
        rows -= self._shift
        self._n += len(rows)
        self._sum += rows.sum(0)
        self._scatter.addmm_(rows.mT, rows)

    def _check_dim(self, other: StreamingStatistics) -> None:
        if other.dim != self.dim:
            raise BadInput(f"statistics: expected two of one dim, got {self.dim} and {other.dim}")

    def _require(self, least: int) -> None:
        if self._n < least:
            raise BadInput(f"statistics: expected features of at least {least} images, got {self._n}")
