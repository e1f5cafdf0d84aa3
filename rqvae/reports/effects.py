"""Whether an intervention changed something: runs that differ in it alone, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rqvae.errors import BadInput
from rqvae.metrics.intervals import half_width
from rqvae.reports.page import Cell
from rqvae.reports.run_files import RunFiles

LEAST_SEEDS = 3
"""With two seeds the interval is 9 times as wide as their difference; with one there is none."""
SEED, STRATEGY = "train.seed", "intervention.strategy"
_ELSEWHERE = ("tracking.", "logging.", "train.threads", "train.log_every", "profile", "pictures.", "checkpoint.")
"""Keys that change no weight: runs that differ in these alone are one arm."""


@dataclass(frozen=True)
class Effect:
    """The difference of two arms in one value.

    Args:
        key: of the value.
        arm: that is held against the baseline.
        seeds: that both arms have.
        mean: over seeds of arm minus baseline.
        low: end of the mean's 95 % interval.
        high: other end.
    """

    key: str
    arm: str
    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`higher` or `lower` than the baseline; `not resolved` where the interval covers 0."""
        if self.low <= 0 <= self.high:
            return "not resolved"
        return "higher" if self.mean > 0 else "lower"


@dataclass
class Arm:
    """Runs of one config but for the seed.

    Args:
        name: what its intervention is.
        intervenes: whether it is more than to watch.
        values: key -> seed -> the run's last value.
    """

    name: str
    intervenes: bool
    values: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def seeds(self) -> set[int]:
        """Of its runs."""
        return {seed for by_seed in self.values.values() for seed in by_seed}


def paired_effect(key: str, arm: str, baseline: Mapping[int, float], other: Mapping[int, float]) -> Effect:
    """Mean over seeds of `other` minus `baseline`, with the 95 % interval of Student's t of the differences.

    Raises:
        BadInput: fewer than 3 seeds that both have.
    """
    seeds = tuple(sorted(baseline.keys() & other.keys()))
    if len(seeds) < LEAST_SEEDS:
        raise BadInput(f"{key} of {arm} against the baseline: expected at least {LEAST_SEEDS} seeds that both have, "
                       f"got {len(seeds)}")  # fmt: skip
    differences = np.array([other[seed] - baseline[seed] for seed in seeds])
    mean, half = float(differences.mean()), half_width(differences.tolist())
    return Effect(key, arm, seeds, mean, mean - half, mean + half)


def arms_of(runs: Sequence[RunFiles], keys: Sequence[str]) -> list[Arm]:
    """The runs by what they have in common, those that do not intervene first.

    Args:
        runs: read.
        keys: of values in metrics.jsonl; of each the last finite one is taken.

    Raises:
        BadInput: runs that differ in more than seed and intervention, which no seed makes comparable.
    """
    _check_alike(runs)
    found: dict[tuple[tuple[str, Cell], ...], Arm] = {}
    for run in runs:
        settings = {k: v for k, v in run.config.items() if k.startswith("intervention.")}
        strategy = str(settings.get(STRATEGY, "none"))
        acts = strategy != "none" and not settings.get("intervention.dry_run")
        # without an act its other settings say nothing
        identity = tuple(sorted((k, str(v)) for k, v in settings.items())) if acts else ()
        name = strategy if acts else "none"
        arm = found.setdefault(identity, Arm(name, acts))
        seed = run.config.get(SEED, 0)
        for key in keys:
            if key in run.metrics.keys:
                values = run.metrics.series(key)[1]
                if np.isfinite(values).any():
                    arm.values.setdefault(key, {})[int(str(seed))] = float(values[np.isfinite(values)][-1])
    arms = sorted(found.values(), key=lambda arm: arm.intervenes)
    for name in {arm.name for arm in arms}:
        same = [arm for arm in arms if arm.name == name]
        for number, arm in enumerate(same, 1):
            arm.name = name if len(same) == 1 else f"{name} {number}"
    return arms


def _check_alike(runs: Sequence[RunFiles]) -> None:
    ignored = (*_ELSEWHERE, "intervention.", SEED)
    first = {k: v for k, v in runs[0].config.items() if not k.startswith(ignored)}
    for run in runs[1:]:
        other = {k: v for k, v in run.config.items() if not k.startswith(ignored)}
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise BadInput(f"{run.folder / 'config.yaml'}: {key}: expected {first.get(key)} as in {runs[0].name}, "
                               f"since only seeds and interventions are compared, got {other.get(key)}")  # fmt: skip
