"""The schedule of the learning rate, and averages of weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.checks.optimizer import finite_series
from rqvae.health.finding import Evidence, Found, NotAssessed, at, check, stated
from rqvae.health.schedules import schedule_of
from rqvae.health.subject import Subject


@check(
    "OPT.SCHEDULE_MISMATCH",
    "the logged learning rate is not the configured one",
    "major",
    needs=("lr_trend", "config"),
    threshold="the schedule of the config (constant, linear, cosine, one-cycle; with its warm-up) differs "
    "from the log by more "
    "than 10 % of its peak at more than a quarter of the points",
    alternatives=("a schedule that counts other steps (micro-batches, epochs)",),
    recommendation=("look for a second place that sets the rate, and for steps counted per rank or micro-batch",),
    verify="both curves lie on each other in the report",
)
def schedule_mismatch(subject: Subject) -> Iterator[Found]:
    """Reconstructed against logged."""
    series, schedule = finite_series(subject, "lr"), schedule_of(subject)
    if schedule is None:
        raise NotAssessed("log the scheduler's name, its peak and the number of steps")
    expected = schedule.at(series.steps)
    wrong = np.abs(expected - series.values) > 0.1 * schedule.peak
    if wrong.mean() > 0.25:
        worst = int(np.argmax(np.abs(expected - series.values)))
        text = (
            f"at {series.steps[worst]:g} the log has {series.values[worst]:.3g}, {schedule.name} gives "
            f"{expected[worst]:.3g}"
        )
        yield Found(text, (at(series, worst), *(stated(s) for s in schedule.settings)), power=f"{len(series)} points")


@check(
    "OPT.SCHEDULE_RESTART_JUMP",
    "the learning rate jumps back",
    "major",
    needs=("lr_trend",),
    threshold="after it had decayed below half of its peak the learning rate more than doubles between two "
    "points, to half of "
    "its peak or more, once or twice (more often is a cyclic schedule)",
    alternatives=("warm restarts on purpose",),
    recommendation=(
        "save and load the scheduler's state",
        "give the schedule the total number of steps, not the remaining",
    ),
    verify="the rate is continuous over a resume",
)
def restart_jump(subject: Subject) -> Iterator[Found]:
    """Jumps after decay."""
    series = finite_series(subject, "lr")
    values, peak = series.values, float(series.values.max())
    top = int(np.argmax(values >= 0.9 * peak))
    jumps = [
        i
        for i in range(max(1, top + 1), len(values))
        if values[i] > 2 * values[i - 1] and values[i] >= 0.5 * peak and values[i - 1] < 0.5 * peak
    ]
    if peak > 0 and 1 <= len(jumps) <= 2:
        i = jumps[0]
        yield Found(
            f"{series.name} jumps from {values[i - 1]:.3g} to {values[i]:.3g} at {series.steps[i]:g}",
            (at(series, i - 1), at(series, i)),
            power=f"{len(series)} points",
            confidence=0.85,
        )


@check(
    "OPT.SCHEDULE_WARMUP_SKIPPED",
    "the warm-up is skipped",
    "major",
    needs=(),
    threshold="a one-cycle schedule whose warm-up (30 % of its steps) has fewer than 10 steps; or a stated "
    "warm-up of 10 steps or "
    "more while the first logged rate within it is at 90 % of the peak",
    alternatives=("a smoke test, where it does not matter",),
    recommendation=(
        "do not judge a loss by a run this short: its first step is taken at the full learning rate",
        "for smoke tests use a constant schedule",
    ),
    verify="the first logged rate is below a tenth of the peak",
    source="torch.optim.lr_scheduler.OneCycleLR: pct_start 0.3, div_factor 25, final_div_factor 1e4",
)
def warmup_skipped(subject: Subject) -> Iterator[Found]:
    """Warm-ups of no length."""
    schedule, lr = schedule_of(subject), subject.one("lr")
    if schedule is None and (lr is None or subject.number("warmup") is None):
        raise NotAssessed("log the scheduler, its warm-up and the learning rate")
    if schedule is not None and schedule.name == "one-cycle" and 0.3 * schedule.steps < 10:
        rates = ", ".join(f"{rate:.2g}" for rate in schedule.at(np.arange(min(schedule.steps, 4))))
        text = f"a one-cycle schedule over {schedule.steps:g} steps has no warm-up: its rates are {rates}"
        yield Found(
            text, tuple(stated(s) for s in schedule.settings), confidence=0.9, power="reconstructed from the config"
        )
        return
    warmup = subject.setting("warmup")
    if lr is None or warmup is None or warmup.number is None:
        return
    early = lr.finite.values[lr.finite.steps < 0.5 * warmup.number]
    if warmup.number >= 10 and len(early) and early[0] >= 0.9 * lr.finite.values.max() > 0:
        text = f"a warm-up of {warmup.number:g} steps is stated, the rate is {early[0]:.3g} at {lr.steps[0]:g}"
        yield Found(text, (stated(warmup), at(lr, 0)), power=f"{len(lr)} points")


@check(
    "OPT.SCHEDULE_STEPS_OVER_TOTAL",
    "the run goes on after the end of its schedule",
    "major",
    needs=("train_loss", "step_total"),
    threshold="the last step is more than 1 % beyond the stated number of steps",
    alternatives=("a log that counts micro-batches",),
    recommendation=("give the schedule the number of steps that the run really takes",),
    verify="the last step is the stated one",
)
def over_total(subject: Subject) -> Iterator[Found]:
    """Last step against the total."""
    loss, total = subject.loss, subject.setting("steps")
    assert loss is not None
    if total is None or not total.number or subject.log.unit != "step":
        raise NotAssessed("log how many steps the run was to take")
    if loss.steps[-1] > 1.01 * total.number + 1:
        yield Found(
            f"the log reaches step {loss.steps[-1]:g} of {total.number:g}",
            (stated(total), at(loss, len(loss) - 1)),
            power="stated",
        )


def _progress(subject: Subject) -> float:
    loss = subject.loss
    if loss is None or not len(loss) or subject.log.unit != "step":
        raise NotAssessed("log the training loss with its step")
    return float(loss.steps[-1])


@check(
    "EMA.NOT_STARTED",
    "the average of weights has not begun",
    "major",
    needs=("train_loss",),
    threshold="samples are taken before the step at which the average starts (stated, or 100 with the "
    "package ema_pytorch)",
    alternatives=("a smoke test, where it does not matter",),
    recommendation=("do not judge these samples as samples of an average", "start the average earlier for short runs"),
    verify="the run is longer than the start of the average and 3 half-lives",
    source="ema_pytorch.EMA: update_after_step = 100, before it the average is a copy",
)
def ema_not_started(subject: Subject) -> Iterator[Found]:
    """Sampling before the average starts."""
    last, sampled = _progress(subject), subject.log.of_kind("sampling")
    after = subject.setting("ema_after")
    package = subject.source is not None and any(
        "ema_pytorch" in line for f in subject.source.files for line in f.lines
    )
    every = subject.setting("sample_every")
    start = after.number if after and after.number else 100.0 if package else None
    if start is None:
        raise NotAssessed("log the step at which the average of weights starts (or give --source)")
    if last < start and (sampled or (every and every.number and every.number <= last)):
        places = tuple(Evidence(e.text, e.line) for e in sampled[:1]) + tuple(stated(s) for s in (after, every) if s)
        yield Found(
            f"samples are taken at step {last:g}, the average starts after {start:g}: they are samples of a copy",
            places,
            confidence=0.9 if after else 0.8,
            power="stated in log, config or source",
        )


@check(
    "EMA.HORIZON",
    "the average is longer than the run",
    "minor",
    needs=("train_loss",),
    threshold="the half-life log 2 / (1 - decay) is above 20 % of the run's steps",
    recommendation=("choose the decay for a half-life below 5 % of the run, or a power profile",),
    verify="the held-out loss of the average is below that of the weights",
    source="Karras et al., EDM2, 2024",
)
def ema_horizon(subject: Subject) -> Iterator[Found]:
    """Half-life against the run's length."""
    decay, last = subject.setting("ema_decay"), _progress(subject)
    if decay is None or decay.number is None or not 0.5 < decay.number < 1:
        raise NotAssessed("log the decay of the average of weights")
    total = subject.total_steps or last
    half = float(np.log(2) / (1 - decay.number))
    if half > 0.2 * total:
        yield Found(
            f"a decay of {decay.number:g} has a half-life of {half:.0f} steps, the run has {total:g}",
            (stated(decay),),
            power="stated",
        )


@check(
    "EMA.LAG",
    "the average is worse than the weights",
    "minor",
    needs=("ema_eval", "eval_loss"),
    threshold="the held-out loss of the average is above that of the weights in the last 3 evaluations",
    alternatives=("a run shorter than 3 half-lives, where this is always so",),
    recommendation=("shorten the average", "check that it is updated"),
    verify="the average is better",
)
def ema_lag(subject: Subject) -> Iterator[Found]:
    """Average against weights."""
    average, raw = finite_series(subject, "ema_eval"), finite_series(subject, "eval_loss")
    same = np.interp(average.steps, raw.steps, raw.values)
    if len(average) >= 3 and (average.values[-3:] > 1.01 * same[-3:]).all():
        yield Found(f"{average.name} is {average.values[-1]:.4g}, {raw.name} is {raw.values[-1]:.4g}",
                    (at(average, len(average) - 1), at(raw, len(raw) - 1)), power=f"{len(average)} "
                        "evaluations")  # fmt: skip
