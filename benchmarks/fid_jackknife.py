"""How often intervals of 95 % cover the distance of endless samples, where it is known in closed form.

5000 samples of a normal distribution of 64 features, the reference another one, whose moments are exact; 50 groups. The
jackknife's interval lies about the estimate less its bias. For comparison a bootstrap of the same groups by
percentiles, which repeats samples and so adds the bias once more.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.record import save
from rqvae.metrics.frechet import frechet_distance
from rqvae.metrics.jackknife import GroupedStatistics, jackknife_frechet
from rqvae.metrics.statistics import StreamingStatistics

DIM, SAMPLES, GROUPS, RESAMPLES = 64, 5000, 50, 100


def bootstrap(parts: list[StreamingStatistics], mu: np.ndarray, cov: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the distance of groups that are drawn with replacement."""
    draw, values = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        whole = StreamingStatistics(DIM)
        for k in draw.integers(0, GROUPS, GROUPS):
            whole.merge(parts[k])
        values.append(frechet_distance(whole.mean, whole.cov, mu, cov))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mu, variances = np.full(DIM, 0.02), np.linspace(0.9, 1.1, DIM)
    cov, truth = np.diag(variances), float((mu**2).sum() + ((variances**0.5 - 1) ** 2).sum())
    found, resampled = [], []
    for repeat in range(options.repeats):
        groups = GroupedStatistics(DIM, GROUPS, seed=repeat)
        rows = np.random.default_rng([7, repeat]).normal(size=(SAMPLES, DIM))
        groups.update(rows, torch.arange(SAMPLES))
        found.append(jackknife_frechet(groups.parts, mu, cov))
        resampled.append(bootstrap(groups.parts, mu, cov, repeat))
    figures = {
        "truth": truth,
        "mean_estimate": float(np.mean([x.estimate for x in found])),
        "mean_bias_corrected": float(np.mean([x.bias_corrected for x in found])),
        "standard_deviation": float(np.std([x.bias_corrected for x in found], ddof=1)),
        "mean_standard_error": float(np.mean([x.standard_error for x in found])),
        "repeats": options.repeats,
        "coverage": float(np.mean([x.low <= truth <= x.high for x in found])),
        "least_coverage": 0.9,
        "coverage_of_bootstrap": float(np.mean([low <= truth <= high for low, high in resampled])),
    }
    save("fid_jackknife", figures)


if __name__ == "__main__":
    main()
