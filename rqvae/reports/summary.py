"""Last and best values of what runs logged, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from rqvae.reports.curves import default_keys
from rqvae.reports.metrics_file import Metrics
from rqvae.reports.page import Cell

HIGHER = {"psnr", "ssim", "is", "precision", "recall", "density", "coverage"}
LOWER = {"loss", "fid", "rfid", "gfid", "sfid", "kid", "fd", "lpips", "mse", "mae", "nll", "bpd"}
NEITHER = {"gan", "disc", "latent"}
"""Words of a name. A GAN's two losses are sides of a game, a latent loss is one of a bargain: low is no better."""

SPEEDS = {
    "train/images_per_s": "images/s, median",
    "train/images_per_s_device": "images/s of a device, median",
    "train/tflops_per_s_device": "TFLOP/s of a device, median",
    "train/mfu": "MFU, median",
}
"""Keys of the log that say how fast a run was, and what the median of their rows is called."""


def direction(key: str) -> int:
    """1 where a higher value is better, -1 where a lower one is, 0 where neither is or nobody knows."""
    words = set(re.split(r"[^a-z]+", key.rpartition("/")[2].lower()))
    if words & NEITHER:
        return 0
    return int(bool(words & HIGHER)) - int(bool(words & LOWER))


def best(metrics: Metrics, key: str) -> tuple[float, int] | None:
    """The best finite value and its step, as logged; None where there is none or no way is better."""
    in_a_game = key == "train/loss_total" and "train/loss_gan" in metrics.keys
    sign = 0 if in_a_game else direction(key)
    steps, values = metrics.series(key)
    if sign == 0 or not np.isfinite(values).any():
        return None
    at = int(np.nanargmax(sign * np.where(np.isfinite(values), values, np.nan)))
    return float(values[at]), int(steps[at])


def summary_rows(runs: Sequence[Metrics]) -> list[list[Cell]]:
    """A row for each value and run: name of the value (once), run, last value, best value, step of the best one."""
    rows: list[list[Cell]] = []
    for key in default_keys(runs):
        if key in SPEEDS:
            continue
        name = key
        for run in runs:
            if key not in run.keys:
                continue
            found = best(run, key)
            last = [row[key] for row in run.rows if key in row][-1]
            rows.append([name, run.name, last, *(found if found else (None, None))])
            name = ""
    return rows


def median_speeds(metrics: Metrics) -> dict[str, Cell]:
    """Medians of the rows: a row with pictures or scores in it, or a profile, does not count for more than others."""
    return {label: float(np.nanmedian(metrics.series(key)[1])) for key, label in SPEEDS.items() if key in metrics.keys}
