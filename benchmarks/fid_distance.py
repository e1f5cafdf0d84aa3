"""The Fréchet distance of 2048 features against pytorch-fid's `calculate_frechet_distance`, in turn on one thread.

Full rank: 6000 against 6000 samples, from means and covariances. Deficient: 1000 against 1000, from the features, where
the peer first takes means and covariances. pytorch-fid 0.3.0 needs SciPy < 1.18.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from benchmarks.record import alternate, save
from rqvae.metrics.frechet import frechet, frechet_features

DIM, MANY, FEW = 2048, 6000, 1000


def features(count: int, seed: int, mix: np.ndarray) -> np.ndarray:
    """(count, DIM) correlated and not negative, as pooled activations are."""
    rows = np.random.default_rng(seed).normal(size=(count, DIM)) @ mix
    return np.maximum(rows + 0.3 + 0.02 * seed, 0)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, as pytorch-fid takes them."""
    return rows.mean(0), np.cov(rows, rowvar=False)


def compared(ours: Callable[[], float], peer: Callable[[], float], pairs: int, aim: float) -> dict[str, Any]:
    """Both values once, then the times; `aim` is the speedup that is wanted."""
    values = {"ours": ours(), "peer": peer()}
    times = alternate(lambda: void(ours()), lambda: void(peer()), pairs, warmup=0)
    return {**values, **times, "speedup": round(1 / times["ratio"], 2), "aim": aim}


def void(_: float) -> None:
    """A timed step gives nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    mix = np.random.default_rng(9).normal(size=(DIM, DIM)) / DIM**0.5
    x, y = features(MANY, 1, mix), features(MANY, 2, mix)
    a, b, few_x, few_y = moments(x), moments(y), x[:FEW], y[:FEW]
    figures = {
        "full_rank": compared(
            lambda: frechet(*a, *b).value, lambda: float(calculate_frechet_distance(*a, *b)), options.pairs, 6.0
        ),
        "1000_samples": compared(
            lambda: frechet_features(few_x, few_y).value,
            lambda: float(calculate_frechet_distance(*moments(few_x), *moments(few_y))),
            options.pairs,
            15.0,
        ),
    }
    save("fid_distance", figures)


if __name__ == "__main__":
    main()
