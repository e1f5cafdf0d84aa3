"""Whether the run ran: steps, length, ends, restarts, speed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Evidence, Found, NotAssessed, at, check, stated
from rqvae.health.log import Series
from rqvae.health.subject import Subject

_SHORT = 20
_STALL_SECONDS = 1800.0


@check(
    "RUN.NO_STEPS",
    "not one step",
    "major",
    needs=(),
    threshold="the log announces training (a start, a model, an epoch) and has no point of any series",
    alternatives=("output that was buffered when the run was killed", "a logging interval longer than the run"),
    recommendation=(
        "run it again in the foreground with a log every step",
        "look at stderr, memory and the scheduler's log",
    ),
    verify="the first point appears within minutes",
)
def no_steps(subject: Subject) -> Iterator[Found]:
    """Announced, never stepped."""
    log = subject.log
    if any(len(series) for segment in log.segments for series in segment.series.values()):
        return
    error = next(iter(log.of_kind("error")), None)
    places = [Evidence(event.text, event.line) for event in (log.of_kind("epoch") or log.of_kind("start"))[-1:]]
    places += [Evidence(error.text, error.line)] if error else []
    words = f"; it ends with {error.text[:80]!r}" if error else ""
    yield Found(
        f"{log.lines} lines and not one point{words}",
        tuple(places),
        confidence=0.95,
        power=f"all {log.lines} lines were read",
    )


@check(
    "RUN.FAILED",
    "the run ended in an error",
    "major",
    needs=(),
    threshold="a traceback, an exception or an out-of-memory message stands after the last point",
    recommendation=("see the error's line",),
    verify="the run ends by itself",
)
def failed(subject: Subject) -> Iterator[Found]:
    """An error after the last point."""
    log = subject.log
    errors = log.of_kind("error")
    last = max((int(s.lines[-1]) for g in log.segments for s in g.series.values() if len(s)), default=0)
    late = [event for event in errors if event.line > last]
    if late and last and not log.counts.get("done"):
        yield Found(
            f"the log ends with {late[-1].text[:100]!r}",
            tuple(Evidence(e.text, e.line) for e in late[-2:]),
            confidence=0.9,
            power="all lines were read",
        )


@check(
    "RUN.TOO_SHORT",
    "too few points to judge a trend",
    "info",
    needs=("train_loss",),
    threshold=f"fewer than {_SHORT} points of the training loss",
    recommendation=("log more often, or run longer, before judging the loss",),
    verify=f"{_SHORT} points or more",
)
def too_short(subject: Subject) -> Iterator[Found]:
    """Few points: no trend."""
    loss = subject.loss
    assert loss is not None
    if len(loss) < _SHORT:
        words = {1: "one point", 2: "two points"}.get(len(loss), f"{len(loss)} points")
        values = ", ".join(f"{value:.4g}" for value in loss.values[:5])
        yield Found(
            f"{words}, no trend can be inferred ({loss.name}: {values})",
            tuple(at(loss, i) for i in range(min(len(loss), 3))),
            confidence=1.0,
        )


@check(
    "RUN.TRUNCATED",
    "the run stopped before its end",
    "info",
    needs=(),
    threshold="fewer steps or epochs than stated (by 2 % or more), and no word of an end",
    alternatives=("a run that is still going", "stopped on purpose"),
    recommendation=("resume it, or see what ended it",),
    verify="the log reaches the stated number of steps",
)
def truncated(subject: Subject) -> Iterator[Found]:
    """Short of what was stated."""
    log = subject.log
    ended = log.counts.get("done", 0) > 0
    steps, epochs, loss = subject.setting("steps"), subject.setting("epochs"), subject.loss
    if loss is None or not len(loss) or (steps is None and epochs is None):
        raise NotAssessed("log how many steps or epochs the run was to take")
    last = at(loss, len(loss) - 1)
    if not ended and steps is not None and steps.number and log.unit == "step" and loss.steps[-1] < 0.98 * steps.number:
        yield Found(
            f"the log ends at step {loss.steps[-1]:g} of {steps.number:g}", (stated(steps), last), power="stated"
        )
    elif not ended and steps is None and epochs is not None and epochs.number:
        marks, series = log.of_kind("epoch"), subject.one("epoch")
        reached = float(series.values[-1]) if series is not None else float(marks[-1].text) + 1 if marks else None
        if reached is None:
            raise NotAssessed("log the epoch of each point")
        if reached < 0.98 * epochs.number:
            words = f"the log ends in epoch {reached:g} of {epochs.number:g} without a word of an end"
            yield Found(words, (stated(epochs), last), power="stated")


@check(
    "RUN.MULTI_SEGMENT",
    "several runs in one file",
    "info",
    needs=(),
    threshold="the step falls back to the beginning, or the file names several runs; each is judged by itself",
    recommendation=("write one log a run",),
    verify="one run in the file",
)
def several(subject: Subject) -> Iterator[Found]:
    """More than one segment; told once, with the first."""
    segments = subject.log.segments
    if len(segments) > 1 and subject.segment is segments[0]:
        names = ", ".join(segment.label or "the first" for segment in segments[:6])
        yield Found(f"{len(segments)} runs: {names}", power="all lines were read", confidence=0.95)


@check(
    "RUN.RESTARTS",
    "the run was resumed",
    "info",
    needs=(),
    threshold="the step falls back by some way; points that were written again are left out",
    recommendation=("see why it ended; compare loss and learning rate before and after",),
    verify="the step never falls back",
)
def restarts(subject: Subject) -> Iterator[Found]:
    """Steps that fall back."""
    lines = {event.line: event for event in subject.log.of_kind("restart")}
    events = list(lines.values())
    if events:
        yield Found(
            f"resumed {len(events)} time(s)", tuple(Evidence(e.text, e.line) for e in events[:5]), power="all points"
        )


def _gaps(subject: Subject) -> tuple[Series, np.ndarray]:
    """Time stamps (n,) and seconds between them (n - 1,)."""
    times = subject.one("wall_time")
    assert times is not None
    return times, np.diff(times.values)


@check(
    "RUN.STALLED",
    "the run stood still",
    "major",
    needs=("wall_time",),
    threshold="30 minutes or more, and more than 10 times the median interval per step, between two points, "
    "not across a restart",
    alternatives=("an evaluation or a sampling that takes long", "a computer that was asleep"),
    recommendation=("look at the data loader and the file system at that time", "log evaluations as events"),
    verify="no interval above 10 times the median",
    source="SageMaker Debugger, StalledTraining: 1800 s",
)
def stalled(subject: Subject) -> Iterator[Found]:
    """Long gaps between points."""
    times, gaps = _gaps(subject)
    span = np.diff(times.steps)
    good = (gaps > 0) & (span > 0)
    if good.sum() < 8:
        raise NotAssessed("log a time stamp at 10 points or more")
    pace = float(np.median(gaps[good] / span[good]))
    breaks = [
        event.line for event in subject.log.events if event.kind in ("restart", "start", "sampling", "checkpoint")
    ]
    for i in np.flatnonzero(good & (gaps >= _STALL_SECONDS) & (gaps > 10 * pace * span)):
        if i == 0 or any(times.lines[i] < line <= times.lines[i + 1] for line in breaks):
            continue
        text = (
            f"{gaps[i] / 60:.0f} minutes between {times.steps[i]:g} and {times.steps[i + 1]:g}, the "
            f"usual is {pace * span[i] / 60:.1f}"
        )
        yield Found(text, (at(times, int(i)), at(times, int(i) + 1)), confidence=0.8, power=f"{len(times)} time stamps")
        return


@check(
    "PERF.THROUGHPUT_DROP",
    "the run became slower",
    "minor",
    needs=("throughput",),
    threshold="20 % below the median of the first half over the last 10 intervals, the first one left out",
    alternatives=("another program on the machine", "longer samples"),
    recommendation=("profile a step late in the run", "look for memory that grows and for logs that are rewritten"),
    verify="the speed at the end is that of the beginning",
)
def slower(subject: Subject) -> Iterator[Found]:
    """Speed at the end against the first half."""
    series = max(subject.all("throughput"), key=len).finite
    values = series.values[1:]
    early, late = float(np.median(values[: max(1, len(values) // 2)])), float(np.median(values[-10:]))
    if late < 0.8 * early and (values[-10:] < 0.9 * early).mean() > 0.9:
        yield Found(
            f"{series.name} falls from {early:.3g} to {late:.3g}",
            (at(series, 1), at(series, len(series) - 1)),
            power=f"{len(series)} points of {series.name}",
        )


@check(
    "PERF.STEP_OUTLIER",
    "single intervals take far longer",
    "minor",
    needs=("wall_time",),
    threshold="more than 2 % of the intervals (3 or more) take over 3 times the median, the first left out",
    alternatives=("evaluations and checkpoints that are due then",),
    recommendation=("see whether they come at checkpoints, evaluations or the border of an epoch",),
    verify="fewer than 2 %",
)
def outliers(subject: Subject) -> Iterator[Found]:
    """Share of slow intervals."""
    times, gaps = _gaps(subject)
    span = np.diff(times.steps)
    good = (gaps > 0) & (span > 0)
    pace = gaps[good] / span[good]
    slow = int((pace[1:] > 3 * np.median(pace)).sum()) if len(pace) > 20 else 0
    if slow >= 3 and slow > 0.02 * len(pace):
        yield Found(
            f"{slow} of {len(pace)} intervals take over 3 times the median",
            (at(times, 0),),
            power=f"{len(times)} time stamps",
        )


@check(
    "PERF.EVAL_SHARE",
    "most time goes into evaluation",
    "minor",
    needs=(),
    threshold="over 30 % of the time is not spent on steps, by the bar's clock or the logged times",
    alternatives=("a smoke test, where evaluation comes after every step",),
    recommendation=("evaluate less often, with fewer sampling steps or images",),
    verify="evaluation takes below 10 %",
)
def eval_share(subject: Subject) -> Iterator[Found]:
    """Time beyond the fastest steps where sampling is known to happen, or logged evaluation times."""
    times, runtime = subject.one("wall_time"), subject.one("eval_step_rate")
    if times is not None and len(times) >= 2 and subject.log.counts.get("sampling"):
        pace = np.diff(times.values) / np.maximum(np.diff(times.steps), 1e-9)
        start = times.values[0] / times.steps[0] if times.values[0] < 1e7 and times.steps[0] > 0 else np.inf
        quickest = float(min(start, np.percentile(pace, 25)))
        whole = float(times.values[-1] - times.values[0]) + (0.0 if start == np.inf else float(times.values[0]))
        steps = float(times.steps[-1] - times.steps[0]) + (0.0 if start == np.inf else float(times.steps[0]))
        share = 1 - quickest * steps / whole if whole > 0 else 0.0
        if share > 0.3:
            text = (
                f"{100 * share:.0f} % of {whole:.0f} s are not steps: a step takes {quickest:.3g} s, the "
                f"average is {whole / steps:.3g} s"
            )
            yield Found(
                text, (at(times, 0), at(times, len(times) - 1)), confidence=0.8, power=f"{len(times)} time stamps"
            )
    elif runtime is not None and "runtime" in runtime.name and (total := _total_runtime(subject)):
        share = float(runtime.finite.values.sum()) / total
        if share > 0.3:
            yield Found(
                f"evaluation takes {100 * share:.0f} % of {total:.0f} s",
                (at(runtime, 0),),
                power=f"{len(runtime)} evaluations",
            )
    else:
        raise NotAssessed("log the time of evaluations")


def _total_runtime(subject: Subject) -> float | None:
    found = next((s for s in subject.stated if s.key == "train_runtime"), None)
    return found.number if found else None


@check(
    "PERF.DATA_WAIT",
    "steps wait for data",
    "minor",
    needs=("data_wait",),
    threshold="waiting for data takes more than 20 % (a share), or more than 20 % of the logged step time",
    recommendation=("more workers, or cached data", "check that the configured number of workers reaches the loader"),
    verify="below 5 %",
)
def data_wait(subject: Subject) -> Iterator[Found]:
    """Logged waits."""
    series, step = subject.one("data_wait"), subject.one("step_time")
    assert series is not None
    wait = float(np.median(series.finite.values))
    share = wait / float(np.median(step.finite.values)) if step is not None else wait
    if step is None and wait > 1:
        raise NotAssessed("log the time of a step beside the wait for data")
    if share > 0.2:
        yield Found(
            f"{100 * share:.0f} % of a step is waiting for data",
            (at(series, len(series) - 1),),
            power=f"{len(series)} points",
        )


@check(
    "PERF.MEM_GROWTH",
    "memory grows",
    "minor",
    needs=("memory",),
    threshold="the last tenth is 10 % above the second tenth, per 1000 steps or over the run, rising all along",
    alternatives=("a cache that fills once",),
    recommendation=("look for tensors that are kept with their graph (a loss that is summed without item or detach)",),
    verify="memory is constant after the first epoch",
)
def memory(subject: Subject) -> Iterator[Found]:
    """Memory at the end against the beginning."""
    from rqvae.health.statistics import blocks, mann_kendall

    for series in subject.all("memory"):
        series = series.finite
        tenth = max(2, len(series) // 10)
        early, late = (float(np.median(v)) for v in (series.values[tenth : 2 * tenth], series.values[-tenth:]))
        if early > 0 and late > 1.1 * early and mann_kendall(blocks(series.values).levels[1:]) > 3.3:
            yield Found(
                f"{series.name} grows from {early:.4g} to {late:.4g}",
                (at(series, len(series) - 1),),
                power=f"{len(series)} points",
            )
            return
