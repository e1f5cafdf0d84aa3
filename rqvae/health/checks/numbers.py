"""Values that are not numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Found, NotAssessed, at, check
from rqvae.health.log import Series
from rqvae.health.subject import Subject

_WATCHED = ("train_loss", "grad_norm", "eval_loss", "gan_d", "gan_g", "t_bin", "score_low", "score_high")
_MARKER_RETURNS = 3


def is_marker(series: Series) -> bool:
    """Whether NaN stands for "not logged here": most values are NaN and numbers come back again and again."""
    bad = np.isnan(series.values)
    returns = int((bad[:-1] & ~bad[1:]).sum())
    return bool(bad.mean() > 0.5 and returns >= _MARKER_RETURNS)


def _broken(subject: Subject) -> list[tuple[str, Series, np.ndarray]]:
    """(role, series, indices that are not finite)."""
    found = []
    for role in _WATCHED:
        for series in subject.all(role):
            bad = np.flatnonzero(~np.isfinite(series.values))
            if len(bad) and not is_marker(series):
                found.append((role, series, bad))
    return found


def _any_points(subject: Subject) -> None:
    if not any(subject.all(role) for role in _WATCHED):
        raise NotAssessed("log the training loss")


def _isolated(series: Series, bad: np.ndarray) -> bool:
    """Single steps that a loss scaler skips: never two in a row, below 2 % of all, and numbers follow."""
    return bool(len(bad) < max(2, 0.02 * len(series)) and (np.diff(bad) > 1).all() and bad[-1] < len(series) - 1)


@check(
    "NUM.NONFINITE",
    "NaN or Inf",
    "critical",
    needs=(),
    threshold="one value of a loss, a gradient norm or a score is NaN or Inf; single gradient norms that recover are "
    "what a loss scaler skips (minor)",
    alternatives=("a metric that was divided by an empty count", "a log that writes NaN where nothing was measured"),
    recommendation=(
        "stop the run and resume from the last checkpoint before the first NaN",
        "lower the learning rate or clip gradients; in fp16, change to bf16",
        "look at the samples of the first NaN's step",
    ),
    verify="resume from that checkpoint with the change: the step of the first NaN passes with a finite gradient norm",
)
def nonfinite(subject: Subject) -> Iterator[Found]:
    """Any NaN or Inf."""
    _any_points(subject)
    for role, series, bad in _broken(subject):
        first = int(bad[0])
        harmless = role == "grad_norm" and _isolated(series, bad)
        what = "not finite" if len(bad) > 1 else f"{series.values[first]:g}"
        yield Found(
            f"{series.name} is {what} first at {series.steps[first]:g} ({len(bad)} of {len(series)} points)",
            (*((at(series, first - 1, "the last number before"),) if first else ()), at(series, first)),
            confidence=0.99,
            severity="minor" if harmless else "major" if role.startswith("score") else None,
            power=f"every one of {len(series)} points of {series.name} was looked at",
            steps=(float(series.steps[first]), float(series.steps[bad[-1]])),
        )


@check(
    "RUN.CONTINUED_AFTER_NAN",
    "the run went on after NaN",
    "major",
    needs=("train_loss",),
    threshold="more than one point of the training loss follows its first NaN or Inf, and the last one is not finite",
    recommendation=(
        "end a run whose loss or gradient norm is not finite, or skip the step and count it",
        "treat checkpoints written after the first NaN as lost",
    ),
    verify="inject a NaN into a batch: the run stops, or the step is skipped and counted",
)
def continued(subject: Subject) -> Iterator[Found]:
    """Points after the first NaN."""
    series = subject.train_loss
    assert series is not None
    bad = np.flatnonzero(~np.isfinite(series.values))
    if len(bad) and not is_marker(series) and len(series) - 1 - bad[0] > 1 and bad[-1] == len(series) - 1:
        later = len(series) - 1 - int(bad[0])
        wasted = series.steps[-1] - series.steps[bad[0]]
        yield Found(
            f"{later} more points ({wasted:g} {subject.log.unit}s) were run after {series.name} had become NaN",
            (at(series, int(bad[0])), at(series, len(series) - 1)),
            confidence=0.99,
            steps=(float(series.steps[bad[0]]), float(series.steps[-1])),
        )


@check(
    "NUM.VALUES_REPLACED",
    "values that were not finite were replaced or skipped",
    "minor",
    needs=(),
    threshold="a counter of skipped steps or replaced elements is above 0; major above 1 % of the logged steps",
    recommendation=("find the step and the sample; a rising count means that the run is about to fail",),
    verify="the counter stays at 0",
)
def replaced(subject: Subject) -> Iterator[Found]:
    """Counted replacements."""
    counters = subject.all("skipped")
    if not counters:
        raise NotAssessed("log how many steps were skipped or elements replaced because they were not finite")
    for series in counters:
        hit = np.flatnonzero(series.finite.values > 0)
        if len(hit):
            share = len(hit) / len(series)
            severity = "major" if share > 0.01 and len(hit) > 2 else None
            text = f"{series.name} is above 0 in {len(hit)} of {len(series)} points"
            yield Found(text, (at(series.finite, int(hit[0])),), severity=severity, power=f"{len(series)} points")


@check(
    "NUM.LOSS_SCALE_COLLAPSE",
    "the loss scale collapses",
    "major",
    needs=("loss_scale",),
    threshold="after the first 2000 steps the loss scale halves more than 4 times within 1000 steps, or "
    "ends at 1 or below",
    alternatives=("the scaler's search for its level at the start, which is exempt",),
    recommendation=("use bf16", "lower the learning rate", "look for the layer whose activations overflow"),
    verify="the scale stays above 1 and halves at most once in some thousand steps",
    source="Zhang et al., OPT, 2022: a loss scale at its minimum comes before divergence",
)
def loss_scale(subject: Subject) -> Iterator[Found]:
    """Halvings in a row."""
    series = subject.one("loss_scale")
    assert series is not None
    values = 2.0**series.values if "lg" in series.name.lower() else series.values
    late = series.steps - series.steps[0] > 2000
    halved = np.flatnonzero((values[1:] <= 0.5001 * values[:-1]) & late[1:]) + 1
    steps = series.steps[halved]
    crowded = [i for i in range(len(steps) - 4) if steps[i + 4] - steps[i] <= 1000]
    if crowded:
        first, last = halved[crowded[0]], halved[crowded[0] + 4]
        text = f"{series.name} halves 5 times between {series.steps[first]:g} and {series.steps[last]:g}"
        yield Found(text, (at(series, int(first)), at(series, int(last))), power=f"{len(series)} points")
    elif late[-1] and values[-1] <= 1:
        text = f"{series.name} ends at its minimum, {values[-1]:g}"
        yield Found(text, (at(series, len(series) - 1),), power=f"{len(series)} points")
