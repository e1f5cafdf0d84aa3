"""How often the health checks cry wolf and what they miss: healthy curves, bootstrapped, with faults put into them.

`python -m benchmarks.health_detection --healthy LOG_OR_RUN ... [--list FILE]`: the bases are logs, and folders of runs
with their config.yaml, that somebody else calls healthy; what the checks say about them has no part in the choice.
`--list` names a file with one such path a line, relative to it. A base's loss is a running median times residuals,
which are drawn anew in blocks of 10 points (a block bootstrap keeps their short memory); every copy is then judged as
it is, and with each fault from 60 % on. Beside it, at their defaults and re-stated here from their documents and code:
Lightning's SpikeDetection, the 6-sigma rule of OLMo-core's SkipStepOptimizer, and SageMaker Debugger's
LossNotDecreasing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.record import save
from rqvae.errors import BadInput
from rqvae.health.examine import examine
from rqvae.health.log import RunLog, Segment, Series
from rqvae.health.readers import read_log
from rqvae.health.settings import Setting, read_settings
from rqvae.health.subject import Subject

BLOCK, FROM, LEAST = 10, 0.6, 50
WANTED = {
    "divergence x1.5": {"LOSS.DIVERGED", "LOSS.DRIFT_UP"},
    "divergence x2": {"LOSS.DIVERGED"},
    "divergence x4": {"LOSS.DIVERGED"},
    "collapse": {"LOSS.DIVERGED", "DIFF.TRIVIAL_PREDICTOR"},
    "no learning": {"LOSS.NOT_DECREASING", "DIFF.TRIVIAL_PREDICTOR"},
    "nan": {"NUM.NONFINITE"},
}


def running_median(values: np.ndarray, half: int) -> np.ndarray:
    """(n,) medians over up to 2 * half + 1 points."""
    padded = np.pad(values, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def bootstrap(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A healthy copy (n,) of a positive loss (n,), and its level (n,)."""
    half = int(np.clip(len(values) // 40, 3, 200))
    level = running_median(values, half)
    residual = np.log(values / level)
    starts = rng.integers(0, max(1, len(values) - BLOCK), size=len(values) // BLOCK + 1)
    drawn = np.concatenate([residual[s : s + BLOCK] for s in starts])[: len(values)]
    return level * np.exp(drawn), level


def faults(values: np.ndarray, level: np.ndarray, untaught: float) -> Iterator[tuple[str, np.ndarray]]:
    """(name, loss with the fault (n,)): a divergence goes up from the level that was reached, and stays there."""
    at = int(FROM * len(values))
    ramp = np.clip((np.arange(len(values)) - at) / max(1, 0.02 * len(values)), 0, 1)
    held = values / level * np.where(ramp > 0, np.median(level[max(0, at - 20) : at]), level)
    for factor in (1.5, 2, 4):
        yield f"divergence x{factor:g}", held * (1 + (factor - 1) * ramp)
    if np.median(level[at:]) < 0.8:
        noise = np.clip(np.log(values / level), -0.02, 0.02)
        yield "collapse", np.where(ramp > 0, np.exp(noise), values)
    yield "no learning", values / level * untaught
    broken = values.copy()
    broken[at:] = np.nan
    yield "nan", broken


def lightning_spikes(values: np.ndarray, window: int = 10, rtol: float = 2.0) -> bool:
    """SpikeDetection: not finite, or no improvement and further from the mean of 10 values than rtol times it.

    Source: lightning.fabric.utilities.spike (window 10, warmup 1, rtol 2, finite_only, mode min).
    """
    for i in range(2, len(values)):
        if not np.isfinite(values[i]):
            return True
        mean = float(np.mean(values[max(0, i - window) : i]))
        if values[i] > values[i - 1] and abs(values[i] - mean) >= abs(rtol * mean):
            return True
    return False


def olmo_sigma(values: np.ndarray, window: int = 128, sigma: float = 6.0) -> bool:
    """SkipStepOptimizer: above mean + 6 standard deviations of the last 128 losses, once half of them are there."""
    for i in range(window // 2, len(values)):
        past = values[max(0, i - window) : i]
        if not np.isfinite(values[i]) or values[i] - past.mean() > sigma * past.std(ddof=1):
            return True
    return False


def sagemaker_not_decreasing(values: np.ndarray, steps: int = 10, percent: float = 0.1) -> bool:
    """LossNotDecreasing: a loss that is not 0.1 % lower than 10 logged steps before."""
    return any(not (values[i] < (1 - percent / 100) * values[i - steps]) for i in range(steps, len(values), steps))


PEERS: dict[str, Callable[[np.ndarray], bool]] = {
    "lightning": lightning_spikes,
    "olmo": olmo_sigma,
    "sagemaker": sagemaker_not_decreasing,
}


@dataclass(frozen=True)
class Base:
    """A run that is healthy, by the word of others.

    Args:
        name: folder and file.
        log: with its loss alone.
        config: of a run of ours; () without one.
    """

    name: str
    log: RunLog
    config: tuple[Setting, ...]

    @property
    def subject(self) -> Subject:
        """The only run."""
        return Subject(self.log, self.log.segments[0], self.config)

    def with_loss(self, values: np.ndarray) -> Base:
        """The same with another loss (n,)."""
        loss = self.subject.loss
        assert loss is not None
        series = {loss.name: Series(loss.name, loss.steps, values, loss.lines)}
        return replace(self, log=replace(self.log, segments=(Segment("", series),)))

    def alarms(self, *severities: str) -> set[str]:
        """Ids of findings of these severities."""
        return {f.check.id for f in examine(self.log, self.config).findings if f.severity in severities}


def base_of(place: Path) -> Base:
    """A healthy log, or the folder of a healthy run.

    Raises:
        BadInput: it cannot be read, or its loss has less than 50 points or is not positive.
    """
    log, beside = read_log(place), place / "config.yaml"
    config = read_settings(beside) if beside.is_file() else ()
    base = Base(f"{place.parent.name}/{place.name}", log, config)
    loss = base.subject.loss
    if loss is None or len(loss) < LEAST or loss.values.min() <= 0:
        raise BadInput(f"{place}: expected a positive loss at {LEAST} steps or more, got {len(loss or ())}")
    return base.with_loss(loss.values)


def listed(path: Path) -> list[Path]:
    """The paths in a file, one a line, relative to it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [path.parent / line.strip() for line in lines if line.strip()]


def judge(base: Base, copies: int, tally: dict[str, list[float]]) -> Counter[str]:
    """Add the outcomes of all copies of one base; the ids of its false alarms."""
    rng = np.random.default_rng(sum(base.name.encode()))
    subject, wrong = base.subject, Counter[str]()
    assert subject.loss is not None
    untaught = subject.trivial.value if subject.trivial else float(np.median(subject.loss.values[:5]))
    for _ in range(copies):
        values, level = bootstrap(subject.loss.values, rng)
        well = base.with_loss(values)
        false = well.alarms("critical", "major")
        wrong.update(false)
        tally.setdefault("ours/false", []).append(bool(false))
        tally.setdefault("ours/false critical", []).append(bool(well.alarms("critical")))
        for peer, rule in PEERS.items():
            tally.setdefault(f"{peer}/false", []).append(rule(values))
        for fault, sick in faults(values, level, untaught):
            found = base.with_loss(sick).alarms("critical", "major")
            tally.setdefault(f"ours/{fault}", []).append(bool(found & WANTED[fault]))
            for peer, rule in PEERS.items():
                tally.setdefault(f"{peer}/{fault}", []).append(rule(sick))
    return wrong


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--healthy", nargs="*", type=Path, default=[])
    options.add_argument("--list", type=Path)
    options.add_argument("--copies", type=int, default=25)
    given = options.parse_args()
    tally: dict[str, list[float]] = {}
    false_by_base: dict[str, float] = {}
    wrong: Counter[str] = Counter()
    for place in [*given.healthy, *(listed(given.list) if given.list else ())]:
        own: dict[str, list[float]] = {}
        base = base_of(place)
        wrong += judge(base, given.copies, own)
        false_by_base[base.name] = round(100 * float(np.mean(own["ours/false"])), 1)
        for key, values in own.items():
            tally.setdefault(key, []).extend(values)
    table: dict[str, dict[str, float]] = {}
    for key, values in tally.items():
        who, what = key.split("/", 1)
        table.setdefault(who, {})[f"{what}, %"] = round(100 * float(np.mean(values)), 1)
    told = {"bases": len(false_by_base), "copies": given.copies, "false_by_base": false_by_base}
    save("health_detection", {**told, "false_ids": dict(wrong), **table})


if __name__ == "__main__":
    main()
