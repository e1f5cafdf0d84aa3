"""Means over seeds with the interval that few seeds allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t above 0.5: with t = sqrt(n) tan(a) its density over a is cos(a)^(n - 1)."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    at = float(np.interp(2 * probability - 1, mass / mass[-1], angle))
    return math.sqrt(degrees) * math.tan(at)


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of n >= 2 values, by Student's t of n - 1 degrees of freedom."""
    spread = float(np.std(values, ddof=1))
    return t_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * spread / math.sqrt(len(values))


def tree_means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over the rows that have it, in the same tree; None where none has."""
    return _over(rows, lambda values: float(np.mean(values)) if values else None)


def tree_intervals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """[low, high] of each number's mean, in the same tree; None where fewer than two rows have it."""

    def interval(values: list[float]) -> list[float] | None:
        if len(values) < 2:
            return None
        mean, half = float(np.mean(values)), half_width(values)
        return [mean - half, mean + half]

    return _over(rows, interval)


def finite(tree: Any) -> Any:
    """The tree with None for what is not finite: JSON has neither NaN nor infinity."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _over(rows: Sequence[dict[str, Any]], reduce: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(value, dict):
            found[key] = _over(values, reduce)
        else:
            found[key] = reduce([x for x in values if x is not None and math.isfinite(x)])
    return found
