"""The course of the loss: does it fall, stay, rise, jump."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Evidence, Found, NotAssessed, at, check
from rqvae.health.log import Series
from rqvae.health.rise import FEWEST, Rise, lasting_rise
from rqvae.health.statistics import MAD, Blocks, level_scale, local_noise, mad, mann_kendall
from rqvae.health.subject import Subject

_SURE_Z = 3.3


def _pieces(subject: Subject) -> tuple[Series, Blocks]:
    loss, curve = subject.loss, subject.curve
    assert loss is not None
    assert curve is not None
    return loss, curve


def rise_of(subject: Subject) -> Rise | None:
    """The lasting rise of a subject's loss; None also where there are too few points."""
    if subject.loss is None or subject.curve is None or len(subject.loss) < FEWEST:
        return None
    return lasting_rise(subject.loss.values, subject.curve)


@check(
    "LOSS.DIVERGED",
    "the loss went up and stays up",
    "critical",
    needs=("trend", "minimised"),
    threshold="the last three block medians lie above 1.2 times, and 6 median absolute deviations above, "
    "the lowest level "
    "that was held over a fifth of the run; or the last three points or more lie 50 % above all of the 50 "
    "before; or the mean "
    "logarithm shifts up for good by 20 % and 4.5 standard errors",
    alternatives=("a change of data, loss weights or resolution at that step", "a restart of the learning rate"),
    recommendation=(
        "resume from a checkpoint before the onset",
        "lower the learning rate to a third, or clip gradients at 1",
        "compare the batches and the gradient norm at the onset with those before",
    ),
    verify="300 steps from that checkpoint with the change stay within the level before the onset",
    source="block medians against a held level; Zhang et al., OPT, 2022 for the cures",
)
def diverged(subject: Subject) -> Iterator[Found]:
    """A lasting rise."""
    loss, _ = _pieces(subject)
    rise = rise_of(subject)
    if rise is None:
        return
    onset = rise.onset
    numbers = f"level before {rise.base:.4g}, at the end {rise.tail:.4g}, {rise.units:.0f} median absolute deviations"
    yield Found(
        f"{loss.name} rises from {rise.base:.4g} to {rise.tail:.4g} from {loss.steps[onset]:g} on and stays up",
        (
            at(loss, max(0, onset - 1), "before"),
            at(loss, onset, "onset"),
            at(loss, len(loss) - 1, "end"),
            Evidence(numbers),
        ),
        confidence=0.99 if rise.tail > 1.5 * rise.base and rise.units > 12 else 0.9,
        power=f"{len(loss)} points, {rise.before} before the onset",
        steps=(float(loss.steps[onset]), float(loss.steps[-1])),
    )


def spikes(values: np.ndarray) -> list[tuple[int, int]]:
    """(first, one past last) of runs of 3 points or more above 3 times, and 8 deviations above, the running median."""
    window = max(11, min(101, len(values) // 4))
    if len(values) < 2 * window:
        return []
    starts = np.arange(0, len(values), max(1, window // 4))
    local = np.array([np.median(values[max(0, s - window) : s + window]) for s in starts])
    spread = np.array([mad(values[max(0, s - window) : s + window]) for s in starts])
    index = np.minimum(np.arange(len(values)) // max(1, window // 4), len(starts) - 1)
    high = (values > local[index] + 8 * spread[index]) & (values > 3 * local[index])
    edges = np.flatnonzero(np.diff(np.concatenate(([0], high.astype(np.int8), [0]))))
    runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= 3 and b < len(values)]
    # A running median follows a loss that stays up, which then is no longer high, and has not come back.
    return [(a, b) for a, b in runs if np.median(values[b : b + window]) < 2 * local[index[max(0, a - window)]]]


@check(
    "LOSS.SPIKE_RECOVERED",
    "the loss jumped and came back",
    "minor",
    needs=("trend", "minimised"),
    threshold="three points in a row or more above 3 times the running median and 8 median absolute deviations, "
    "then back",
    alternatives=(
        "a batch of unusual data",
        "few timesteps of a diffusion per batch: then single points, not runs, jump",
    ),
    recommendation=(
        "skip the batches at that step and look at them",
        "clip gradients",
        "keep a checkpoint from before",
    ),
    verify="the same steps with the change show no jump",
    source="Chowdhery et al., PaLM, 2022: restart 100 steps before a spike and skip its batches",
)
def spike(subject: Subject) -> Iterator[Found]:
    """Runs of high points that end."""
    loss, _ = _pieces(subject)
    found = [(a, b) for a, b in spikes(loss.values) if a > len(loss) // 50] if loss.values.min() > 0 else []
    if found:
        a, b = max(found, key=lambda s: float(loss.values[s[0] : s[1]].max()))
        top = a + int(np.argmax(loss.values[a:b]))
        text = (
            f"{len(found)} jump(s) of {loss.name}, the largest to {loss.values[top]:.4g} at "
            f"{loss.steps[top]:g}, recovered"
        )
        yield Found(
            text,
            (at(loss, a - 1, "before"), at(loss, top), at(loss, b, "after")),
            confidence=0.85,
            steps=(float(loss.steps[a]), float(loss.steps[b])),
        )


@check(
    "LOSS.SPIKE_RATE",
    "many jumps of the loss",
    "minor",
    needs=("trend", "minimised"),
    threshold="more than five recovered jumps, one a twentieth of the run or more often in each half",
    recommendation=("lower the learning rate or raise beta2's memory", "clip gradients at a smaller norm"),
    verify="the number of jumps per thousand steps falls",
)
def spike_rate(subject: Subject) -> Iterator[Found]:
    """Jumps in both halves."""
    loss, _ = _pieces(subject)
    found = spikes(loss.values) if loss.values.min() > 0 else []
    late = [s for s in found if s[0] > len(loss) // 2]
    if len(found) > 5 and len(late) >= 3:
        yield Found(
            f"{len(found)} jumps of {loss.name}, {len(late)} of them in the second half",
            tuple(at(loss, a) for a, _ in found[:5]),
            confidence=0.8,
        )


@check(
    "LOSS.DRIFT_UP",
    "the loss creeps upwards",
    "major",
    needs=("trend", "minimised"),
    threshold="the second half has a Mann-Kendall trend above z = 3.3 and ends more than 10 %, and 3 "
    "standard errors of a "
    "block, above its start; not where LOSS.DIVERGED fires",
    alternatives=("data that get harder in order", "a loss weight that grows on purpose"),
    recommendation=("lower the learning rate", "look for a statistic that drifts: weight norms, logits, latents"),
    verify="the second half's trend is flat or falls",
)
def drift(subject: Subject) -> Iterator[Found]:
    """A trend upwards that is no divergence yet."""
    loss, curve = _pieces(subject)
    half = curve.levels[len(curve) // 2 :]
    if len(half) < 6 or rise_of(subject) is not None:
        return
    third = max(2, len(half) // 3)
    start, end = float(np.median(half[:third])), float(np.median(half[-third:]))
    scale = level_scale(loss.values)
    needed = max(0.1, 3 * curve.noise, 6 * local_noise(half) / MAD / scale / np.sqrt(third)) * scale
    z = mann_kendall(half)
    if z > _SURE_Z and end - start > needed:
        middle = int(curve.starts[len(curve) // 2])
        text = f"{loss.name} creeps from {start:.4g} to {end:.4g} over the second half (Mann-Kendall z = {z:.1f})"
        yield Found(
            text,
            (at(loss, middle), at(loss, len(loss) - 1)),
            confidence=0.8,
            steps=(float(loss.steps[middle]), float(loss.steps[-1])),
        )


def falls(subject: Subject) -> tuple[float, float]:
    """(fall, smallest fall that would show) from the first third of a loss to its last, relative to the first.

    A loss that falls within its first points and then stays has fallen: where a shorter beginning (a tenth, a fiftieth)
    lies surely higher, it is taken.
    """
    loss, _ = _pieces(subject)
    values = np.log(loss.values) if loss.values.min() > 0 else loss.values / level_scale(loss.values)
    noise, third = max(local_noise(values), 1e-12), max(3, len(values) // 3)
    visible = 3 * noise * float(np.sqrt(2 / third))
    last, falls_found = float(np.mean(values[-third:])), []
    for head in (third, max(3, len(values) // 10), max(3, len(values) // 50)):
        fall = float(np.mean(values[:head])) - last
        if head == third or fall > max(0.02, _SURE_Z * noise * float(np.sqrt(1 / head + 1 / third))):
            falls_found.append(fall)
    return max(falls_found), visible


def is_flat(subject: Subject) -> bool:
    """Whether the loss is where it was at the start, as far as the points can tell."""
    _, curve = _pieces(subject)
    fall, visible = falls(subject)
    return abs(fall) < max(0.02, visible) and mann_kendall(curve.levels) > -_SURE_Z


@check(
    "LOSS.NOT_DECREASING",
    "the loss does not fall",
    "major",
    needs=("trend", "minimised"),
    threshold="first and last level differ by less than 2 % or what noise allows, no downward Mann-Kendall "
    "trend, and neither "
    "the level nor the log says that the model had been trained before",
    alternatives=("a fine-tune of a converged model: then this is a plateau", "a log that begins late in a run"),
    recommendation=(
        "overfit one batch: the loss must fall to its floor within some hundred steps",
        "print the gradient norm, the learning rate and whether weights change",
        "check that the optimizer got the parameters and that zero_grad comes after step",
    ),
    verify="the loss of one repeated batch falls by 90 %",
)
def not_decreasing(subject: Subject) -> Iterator[Found]:
    """Flat from the first point on."""
    loss, _ = _pieces(subject)
    fall, visible = falls(subject)
    if visible > 0.3:
        raise NotAssessed(f"log more points: noise hides any fall below {100 * visible:.0f} %")
    if not is_flat(subject) or rise_of(subject) is not None or _was_trained(subject):
        return
    text = f"{loss.name} begins and ends at the same level ({np.median(loss.values):.4g}, change {-100 * fall:+.1f} %)"
    yield Found(
        text,
        (at(loss, 0), at(loss, len(loss) - 1)),
        confidence=0.85 if subject.trivial else 0.7,
        power=f"{subject.power()}; a fall of {100 * max(0.02, visible):.0f} % would have been seen",
        steps=(float(loss.steps[0]), float(loss.steps[-1])),
    )


def _was_trained(subject: Subject) -> bool:
    """Whether the log says that the model knew something at its first point."""
    loss = subject.loss
    assert loss is not None
    if subject.starts_trained is not None:
        return True
    span = float(loss.steps[-1] - loss.steps[0])
    late = subject.log.unit != "row" and float(loss.steps[0]) > max(0.5 * span, 1000)
    level = subject.trivial
    learned = level is not None and float(np.median(loss.values[:3])) < 0.7 * level.low
    return late or learned


@check(
    "LOSS.PLATEAU",
    "the loss has levelled off",
    "info",
    needs=("trend", "minimised"),
    threshold="the second half changes by less than 2 %, or what noise allows, without a Mann-Kendall trend",
    alternatives=("noise that hides a slow fall",),
    recommendation=("judge by samples or a score, which may still improve", "decay the learning rate or end the run"),
    verify="a lower learning rate lowers the level, or the score no longer changes",
)
def plateau(subject: Subject) -> Iterator[Found]:
    """A flat second half."""
    loss, curve = _pieces(subject)
    half = curve.levels[len(curve) // 2 :]
    third = max(1, len(half) // 3)
    change = (float(np.median(half[-third:])) - float(np.median(half[:third]))) / level_scale(loss.values)
    visible = max(0.02, 3 * curve.noise / np.sqrt(third))
    if len(half) >= 5 and abs(change) < visible and abs(mann_kendall(half)) < 2.6:
        middle = int(curve.starts[len(curve) // 2])
        text = f"{loss.name} stays at {np.median(half):.4g} over the second half (change {100 * change:+.1f} %)"
        yield Found(
            text,
            (at(loss, middle), at(loss, len(loss) - 1)),
            confidence=0.8,
            steps=(float(loss.steps[middle]), float(loss.steps[-1])),
        )


@check(
    "LOSS.BASELINE_WORSE",
    "worse than the run it is compared with",
    "minor",
    needs=("trend", "baseline", "minimised"),
    threshold="at the last step that both reached, the level lies 10 %, and 3 standard errors, above the baseline's",
    alternatives=("another loss, batch size or data",),
    recommendation=("compare the two configs; the report lists what differs",),
    verify="the levels agree at equal steps",
)
def worse_than_baseline(subject: Subject) -> Iterator[Found]:
    """Level against level at the same step."""
    loss, curve = _pieces(subject)
    other = subject.baseline.loss if subject.baseline else None
    if other is None or subject.baseline is None or subject.baseline.curve is None or len(other) < 8:
        raise NotAssessed("give a baseline with a training loss")
    last = min(loss.steps[-1], other.steps[-1])
    own, theirs = (s.values[s.steps <= last] for s in (loss, other))
    if len(own) < 4 or len(theirs) < 4:
        raise NotAssessed("give a baseline that reached the same steps")
    level, level_other = (float(np.median(v[-max(3, len(v) // 20) :])) for v in (own, theirs))
    margin = max(0.1, 3 * curve.noise + 3 * subject.baseline.curve.noise)
    if level > level_other + margin * abs(level_other):
        end = int(np.flatnonzero(loss.steps <= last)[-1])
        text = f"{loss.name} is {level:.4g} at {last:g} where the baseline had {level_other:.4g}"
        yield Found(text, (at(loss, end), Evidence(f"baseline {subject.baseline.log.path.name}: {level_other:.6g}")))
