"""Whether a loss went up and stayed there, for quiet and for very noisy losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rqvae.health.statistics import MAD, Blocks, level_scale, local_noise, lowest_level, mad

RISE = 0.2
"""Share of its level by which a loss has to stay up before it counts as risen."""
_RAW_RUN, _RAW_BEFORE = 3, 10
FEWEST = _RAW_BEFORE + _RAW_RUN
"""Points below which no rise is looked for."""
_SURE = 4.5


@dataclass(frozen=True)
class Rise:
    """A loss that went up and stayed there.

    Args:
        onset: index of the first point of the rise.
        base: level before, the lowest that was held.
        tail: level at the end.
        units: the rise in median absolute deviations.
        before: points before the onset.
    """

    onset: int
    base: float
    tail: float
    units: float
    before: int


def lasting_rise(values: np.ndarray, curve: Blocks) -> Rise | None:
    """The rise at the end of a loss (n,), or None.

    Three arms: the last three blocks all above the lowest level that was held by 20 % and 6 median absolute deviations;
    for a rise too recent for blocks, three last points or more all far above everything that came shortly before; for a
    loss too noisy for either, two stretches of a fifth of the run or more whose mean logarithms differ.
    """
    return _rise_of_blocks(values, curve) or _rise_of_points(values) or _rise_of_stretches(values)


def _error_of_stretches(means: np.ndarray) -> float:
    """Standard error of one of (n,) means of neighbouring stretches: the larger of what singles and pairs say.

    A loss wobbles more slowly than its steps differ: singles alone called 3 % of copies of a healthy, noisy run risen.
    """
    pairs = means[len(means) % 2 :].reshape(-1, 2).mean(axis=1)
    return max(local_noise(means), float(np.sqrt(2)) * local_noise(pairs), 1e-300)


def _rise_of_stretches(values: np.ndarray) -> Rise | None:
    """A shift of the mean logarithm by 20 % and 4.5 standard errors that its last third keeps."""
    count = min(60, len(values) // 5)
    if count < 20 or values.min() <= 0:
        return None
    size = len(values) // count
    offset = len(values) - count * size
    means = np.log(values[offset:]).reshape(count, size).mean(axis=1)
    error = _error_of_stretches(means)
    best, best_z, least = 0, 0.0, count // 5
    for split in range(least, count - least + 1):
        width = min(split, count - split)
        shift = float(means[split:].mean() - means[split - width : split].mean())
        z = shift / (error * np.sqrt(1 / width + 1 / (count - split)))
        last = float(means[split + 2 * (count - split) // 3 :].mean() - means[split - width : split].mean())
        if z > best_z and min(shift, last) > np.log1p(RISE):
            best, best_z = split, z
    if best_z < _SURE:
        return None
    start = offset + best * size
    width = min(best, count - best)
    base, tail = (float(np.exp(part.mean())) for part in (means[best - width : best], means[best:]))
    return Rise(start, base, tail, best_z * MAD, start)


def _rise_of_blocks(values: np.ndarray, curve: Blocks) -> Rise | None:
    levels = curve.levels
    if len(levels) < 8:
        return None
    window = max(4, len(levels) // 5)
    history = levels[:-3]
    base = lowest_level(history, min(window, len(history)))
    deviation = max(local_noise(levels) / MAD, 1e-300)
    threshold = base + max(RISE * _scale(values, base), 6 * deviation)
    above = levels > threshold
    if not above[-3:].all():
        return None
    onset = len(levels) - int(np.argmin(above[::-1])) if not above.all() else 0
    if onset < 2:
        return None
    tail = float(np.median(levels[-3:]))
    start = int(curve.starts[onset])
    return Rise(start, base, tail, (tail - base) / deviation, start)


def _scale(values: np.ndarray, base: float) -> float:
    """What 20 % of a level means: of the base where the loss is positive, of its spread where it changes sign."""
    return abs(base) if values.min() > 0 else level_scale(values)


def _rise_of_points(values: np.ndarray) -> Rise | None:
    count = len(values)
    if count < FEWEST:
        return None
    lowest_since = np.minimum.accumulate(values[::-1])
    longest = min(count - _RAW_BEFORE, max(_RAW_RUN, count // 3))
    runs = np.arange(_RAW_RUN, longest + 1)
    # Only where all that follows lies above the point before can it lie above all points before.
    for run in runs[lowest_since[runs - 1] > values[count - runs - 1]][::-1]:
        before = values[max(0, count - run - 50) : count - run]
        base, deviation = float(np.median(before)), max(mad(before), 1e-300)
        high = max(before.max() + 0.5 * _scale(values, base), base + 8 * deviation)
        if lowest_since[run - 1] > high:
            start = int(count - run)
            tail = float(np.median(values[start:]))
            return Rise(start, base, tail, (tail - base) / deviation, start)
    return None
