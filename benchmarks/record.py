"""How a figure is kept: with date, commit, hardware, versions and command; and how two things are compared fairly."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name: str, figures: dict[str, Any]) -> None:
    """Write results/NAME.json and print the figures."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *_without_places(sys.argv[1:])]),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts, "figures": figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def _without_places(arguments: list[str]) -> list[str]:
    """Without options whose value is a place on this machine, which nobody else has."""
    at = [k for k, argument in enumerate(arguments) if Path(argument).is_absolute()]
    return [argument for k, argument in enumerate(arguments) if k not in at and k + 1 not in at]


def alternate(ours: Callable[[], None], peer: Callable[[], None], pairs: int, warmup: int = 5) -> dict[str, float]:
    """Time two steps in turn, the first of each pair in turn too, and compare them pair by pair.

    Returns:
        Medians in milliseconds, the median ratio ours / peer with its 95% bootstrap interval, and the median difference
        in microseconds.
    """
    for _ in range(warmup):
        ours()
        peer()
    times = np.empty((pairs, 2))
    for i in range(pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for which in order:
            started = time.perf_counter()
            (ours, peer)[which]()
            times[i, which] = time.perf_counter() - started
    ratios = times[:, 0] / times[:, 1]
    draws = np.random.default_rng(0).integers(0, pairs, (2000, pairs))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return {
        "pairs": pairs,
        "ours_ms": round(float(np.median(times[:, 0])) * 1e3, 3),
        "peer_ms": round(float(np.median(times[:, 1])) * 1e3, 3),
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_low": round(float(low), 4),
        "ratio_high": round(float(high), 4),
        "difference_us": round(float(np.median(times[:, 0] - times[:, 1])) * 1e6, 1),
    }
