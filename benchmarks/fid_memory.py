"""Peak memory of statistics of 5 000 and of 50 000 vectors of 2048 features: what a process of its own had at most."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

import torch

from benchmarks.record import save
from rqvae.metrics.statistics import StreamingStatistics

BATCH, DIM, REPEATS, MIB = 500, 2048, 5, 1.048576


def peak_mib(count: int) -> float:
    """Of a process that sees `count` vectors and takes their covariance."""
    command = [sys.executable, "-m", "benchmarks.fid_memory", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def see(count: int) -> None:
    """Print this process's peak in MiB."""
    torch.set_num_threads(1)
    seen, generator = StreamingStatistics(DIM), torch.Generator().manual_seed(0)
    for _ in range(count // BATCH):
        seen.update(torch.randn(BATCH, DIM, generator=generator))
    assert seen.cov.shape == (DIM, DIM)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # KiB on Linux


def main() -> None:
    if len(sys.argv) > 1:
        see(int(sys.argv[1]))
        return
    few, many = [], []
    for _ in range(REPEATS):  # in turn: a peak moves by some MiB with what malloc gives back
        few.append(peak_mib(5_000))
        many.append(peak_mib(50_000))
    differences = [round((b - a) * MIB, 2) for a, b in zip(few, many, strict=True)]
    figures = {"peaks_mib_5k": few, "peaks_mib_50k": many, "differences_mb": differences}
    save("fid_memory", {**figures, "difference_mb": statistics.median(differences), "limit_mb": 20})


if __name__ == "__main__":
    main()
