"""Kernel Inception Distance of Bińkowski et al. 2018: squared MMD with the kernel (x.y / D + 1)^3, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.metrics.statistics import as_rows


@dataclass(frozen=True)
class KernelDistance:
    """Mean of estimates from subsets.

    Args:
        mean: the distance; it may be negative, as an unbiased estimate of 0 is.
        subset_deviation: spread of the estimate of one subset (ddof 0). It is not the error of the mean, which subsets
            that overlap do not tell.
        subsets: how many.
        size: features of a subset.
        seed: of the draws.
    """

    mean: float
    subset_deviation: float
    subsets: int
    size: int
    seed: int


def kernel_distance(x: Any, y: Any, subsets: int = 100, size: int = 1000, seed: int = 2020) -> KernelDistance:
    """Distance from random subsets, with the draws of torch-fidelity where the seed is 2020.

    Args:
        x: (N1, D) features, any float type, N1 >= size; torch-fidelity's input 1.
        y: (N2, D), N2 >= size.
        subsets: how many, at least 1.
        size: features of a subset, at least 2.
        seed: of a generator of its own; NumPy's global one is not touched.

    Raises:
        BadInput: fewer features than a subset has, other shapes, or a number that is not finite.
    """
    rows1, rows2 = as_rows("x", x), as_rows("y", y)
    least = min(len(rows1), len(rows2))
    if rows1.shape[1] != rows2.shape[1] or subsets < 1 or not 2 <= size <= least:
        raise BadInput(
            f"KID: expected subsets of 2 to {least} of (N, {rows1.shape[1]}) features, got {subsets} of {size} and "
            f"{tuple(rows2.shape)}"
        )
    draw = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        a = rows1[torch.from_numpy(draw.choice(len(rows1), size, replace=False))]
        b = rows2[torch.from_numpy(draw.choice(len(rows2), size, replace=False))]
        estimates.append(squared_mmd(a, b))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)), subsets, size, seed)


def squared_mmd(x: Any, y: Any, tile: int = 2000) -> float:
    """Unbiased estimate from all pairs, which no draw decides; tile by tile.

    Args:
        x: (N1, D) features, N1 >= 2.
        y: (N2, D), N2 >= 2.
        tile: rows of the kernel matrix at a time.
    """
    rows1, rows2 = as_rows("x", x), as_rows("y", y)
    if min(len(rows1), len(rows2)) < 2:
        raise BadInput(f"KID: expected at least 2 features, got {len(rows1)} and {len(rows2)}")
    within = _kernel_sum(rows1, rows1, tile, diagonal=False) / (len(rows1) * (len(rows1) - 1))
    within += _kernel_sum(rows2, rows2, tile, diagonal=False) / (len(rows2) * (len(rows2) - 1))
    return within - 2 * _kernel_sum(rows1, rows2, tile, diagonal=True) / (len(rows1) * len(rows2))


def _kernel_sum(x_nd: Tensor, y_md: Tensor, tile: int, *, diagonal: bool) -> float:
    dim = x_nd.shape[1]
    total = sum(float((rows @ y_md.mT / dim + 1).pow(3).sum()) for rows in x_nd.split(tile))
    if diagonal:
        return total
    return total - float((x_nd.square().sum(1) / dim + 1).pow(3).sum())
