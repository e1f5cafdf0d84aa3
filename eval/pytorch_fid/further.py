"""Scores beside the distance that `python -m eval.pytorch_fid` gives: its error bar, FD-infinity, KID, precision."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from rqvae.errors import BadInput
from rqvae.metrics.evaluation import error_bar
from rqvae.metrics.feature_files import FeatureFile
from rqvae.metrics.jackknife import Jackknife, fd_infinity, interval
from rqvae.metrics.kid import kernel_distance
from rqvae.metrics.precision_recall import precision_recall

OF_BOTH, OF_SAMPLE = ("kid", "neighbours"), ("jackknife", "fd_infinity")
"""Options whose score needs the features of both sides, or of the generated side alone."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a score."""
    group = parser.add_argument_group("further scores, which need images or features and not statistics alone")
    group.add_argument(
        "--jackknife", type=int, nargs="?", const=20, metavar="GROUPS", help="error bar of the distance (20 groups)"
    )
    group.add_argument("--fd-infinity", action="store_true", help="the distance extrapolated to endless samples")
    group.add_argument("--kid", type=int, nargs="?", const=1000, metavar="SIZE", help="100 subsets of SIZE (1000)")
    group.add_argument(
        "--neighbours", type=int, nargs="?", const=3, metavar="K", help="precision, recall, density, coverage (K = 3)"
    )


def needs_features(options: argparse.Namespace) -> bool:
    """Whether an option is given."""
    return any(getattr(options, name) not in (None, False) for name in (*OF_BOTH, *OF_SAMPLE))


def further_scores(options: argparse.Namespace, a: FeatureFile, b: FeatureFile) -> dict[str, Any]:
    """What the options ask for, by their names.

    Args:
        options: the command line.
        a: the reference.
        b: the generated side.

    Raises:
        BadInput: a side whose features are not at hand, or too few of them.
    """
    found: dict[str, Any] = {}
    if options.jackknife is not None:
        found["jackknife"] = asdict(error_bar(a, b, options.jackknife))
    if options.fd_infinity:
        found["fd_infinity"] = asdict(fd_infinity(_features("--fd-infinity", b), a.pooled.mean, a.pooled.cov))
    if options.kid is not None:
        generated, real = _features("--kid", b), _features("--kid", a)
        found["kid"] = asdict(kernel_distance(generated, real, size=options.kid))
    if options.neighbours is not None:
        real, generated = (torch.from_numpy(_features("--neighbours", x)) for x in (a, b))
        shares = precision_recall(real, generated, k=options.neighbours)
        found["neighbours"] = {"k": options.neighbours, "arithmetic": "float32", **shares}
    return found


def described(name: str, found: dict[str, Any]) -> list[str]:
    """A line a score.

    Args:
        name: of the distance.
        found: of `further_scores`.
    """
    lines = []
    if "jackknife" in found:
        lines.append(f"{name}, bias-corrected: {interval(Jackknife(**found['jackknife']))}")
    if "fd_infinity" in found:
        lines.append(f"{name}, n to infinity: {found['fd_infinity']['infinity']:.6f}")
    if "kid" in found:
        kid = found["kid"]
        lines.append(f"kid: {kid['mean']:.8f} (mean of {kid['subsets']} subsets of {kid['size']}, seed {kid['seed']})")
    shares = found.get("neighbours", {})
    lines += [f"{key}: {value:.6f}" for key, value in shares.items() if key not in ("k", "arithmetic")]
    return lines


def _features(option: str, side: FeatureFile) -> np.ndarray:
    if side.features is None:
        raise BadInput(f"{option}: {side.path}: expected images or features, got statistics")
    return side.features
