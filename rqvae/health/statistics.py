"""Robust statistics of noisy curves, in numpy. Each says what it is insensitive to; a check states its own "
"threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
MOST_BLOCKS = 200
FEWEST_BLOCKS = 12
NOISE_GOAL = 0.03


def mad(values: np.ndarray) -> float:
    """Median absolute deviation of (n,), unscaled; 0 for none."""
    return float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def local_noise(values: np.ndarray) -> float:
    """Standard deviation of the noise of (n,) about a slowly moving level: from differences of neighbours."""
    if len(values) < 3:
        return 0.0
    differences = np.diff(values)
    noise = MAD * float(np.median(np.abs(differences))) / math.sqrt(2)
    return noise or float(np.std(differences)) / math.sqrt(2)


def level_scale(values: np.ndarray) -> float:
    """What a relative change of (n,) is relative to: the median where all are positive, else the spread."""
    if len(values) == 0:
        return 1.0
    if values.min() > 0:
        return float(np.median(values))
    low, high = np.percentile(values, [5, 95])
    return float(max(high - low, abs(np.median(values)), 1e-12))


@dataclass(frozen=True)
class Blocks:
    """A curve as medians of equal blocks, counted from its end so that the last block is whole.

    Args:
        levels: (k,) medians.
        starts: (k,) index of each block's first point.
        size: points a block.
        noise: relative standard error of one block's median.
    """

    levels: np.ndarray
    starts: np.ndarray
    size: int
    noise: float

    def __len__(self) -> int:
        return len(self.levels)


def block_size(values: np.ndarray) -> int:
    """The smallest block whose median has a relative error below 3 %, within 12 to 200 blocks."""
    relative = local_noise(values) / max(abs(level_scale(values)), 1e-300)
    needed = math.ceil((1.2533 * relative / NOISE_GOAL) ** 2)
    return int(max(1, min(max(needed, len(values) // MOST_BLOCKS), len(values) // FEWEST_BLOCKS)))


def blocks(values: np.ndarray, size: int | None = None) -> Blocks:
    """Medians of blocks of finite values (n,), n >= 1; points before the first whole block are left out."""
    size = size or block_size(values)
    count = len(values) // size
    offset = len(values) - count * size
    levels = np.median(values[offset:].reshape(count, size), axis=1)
    relative = local_noise(values) / max(abs(level_scale(values)), 1e-300)
    return Blocks(levels, offset + size * np.arange(count), size, 1.2533 * relative / math.sqrt(size))


def mann_kendall(values: np.ndarray) -> float:
    """z of the Mann-Kendall trend test of (n,), n <= a few hundred; positive is upward, 0 for fewer than 4 values.

    Source: Kendall, Rank Correlation Methods, 1975, with the variance's correction for ties.
    """
    n = len(values)
    if n < 4:
        return 0.0
    score = float(np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    return 0.0 if variance <= 0 or score == 0 else (score - math.copysign(1, score)) / math.sqrt(variance)


def binomial_p(successes: int, draws: int, share: float) -> float:
    """Two-sided exact p of a binomial test: the probability of all outcomes no likelier than the one seen."""
    if share <= 0 or share >= 1:
        return 1.0 if successes == draws * share else 0.0
    k = np.arange(draws + 1)
    logs = np.array([math.lgamma(draws + 1) - math.lgamma(i + 1) - math.lgamma(draws - i + 1) for i in k])
    likelihood = np.exp(logs + k * math.log(share) + (draws - k) * math.log1p(-share))
    return float(min(1.0, likelihood[likelihood <= likelihood[successes] * (1 + 1e-7)].sum()))


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """Upper tail of chi square with k - 1 degrees of freedom, by Wilson and Hilferty's cube root (1931)."""
    freedom = len(observed) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def lowest_level(levels: np.ndarray, window: int) -> float:
    """Lowest median over windows of `window` blocks.

    The lowest of single blocks would be biased downwards by noise, and a curve's end would then lie above it by chance:
    the longer the window, the smaller the bias.
    """
    if len(levels) <= window:
        return float(np.median(levels))
    return float(min(np.median(levels[i : i + window]) for i in range(len(levels) - window + 1)))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of (n,), the ends over what there is; for pictures only."""
    if window < 2 or len(values) < 3:
        return values
    total = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)
