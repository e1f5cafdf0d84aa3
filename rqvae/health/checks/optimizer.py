"""Gradients, weights and whether the learning rate fits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.checks.loss import rise_of
from rqvae.health.finding import Found, NotAssessed, at, check, stated
from rqvae.health.log import Series
from rqvae.health.statistics import blocks, mann_kendall
from rqvae.health.subject import Subject


def finite_series(subject: Subject, role: str) -> Series:
    """The finite points of a role that is known to be there."""
    series = subject.one(role)
    assert series is not None
    return series.finite


@check(
    "GRAD.VANISHING",
    "gradients vanish",
    "major",
    needs=("grad_norm",),
    threshold="the median gradient norm of the last tenth (3 points or more) is below 1e-7",
    alternatives=("a frozen module whose norm is logged",),
    recommendation=("check which parameters have a gradient", "check for a detach or no_grad around the network"),
    verify="the norm is above 1e-4 at the first step",
    source="SageMaker Debugger, VanishingGradient: 1e-7",
)
def vanishing(subject: Subject) -> Iterator[Found]:
    """Norms near zero at the end."""
    series = finite_series(subject, "grad_norm")
    tail = series.values[-max(3, len(series) // 10) :]
    if len(series) < 3:
        raise NotAssessed("log the gradient norm at 3 steps or more")
    if np.median(tail) < 1e-7:
        yield Found(
            f"{series.name} is {np.median(tail):.2g} at the end",
            (at(series, len(series) - 1),),
            power=f"{len(series)} points of {series.name}",
        )


@check(
    "GRAD.EXPLODING",
    "gradients explode",
    "major",
    needs=("grad_trend",),
    threshold="the median gradient norm of the last twentieth (3 points or more) is above 10 times that of "
    "the run before",
    alternatives=("a change of data or loss weights",),
    recommendation=("clip gradients", "lower the learning rate", "resume from before the rise"),
    verify="the norm stays within 3 times its median",
)
def exploding(subject: Subject) -> Iterator[Found]:
    """A rise of the norm by ten that lasts to the end."""
    series = finite_series(subject, "grad_norm")
    tail = max(3, len(series) // 20)
    before = float(np.median(series.values[len(series) // 10 : -tail]))
    last = float(np.median(series.values[-tail:]))
    if before > 0 and last > 10 * before and last > 2 * np.percentile(series.values[:-tail], 90):
        yield Found(
            f"{series.name} rises from {before:.3g} to {last:.3g}",
            (at(series, len(series) - tail), at(series, len(series) - 1)),
            power=f"{len(series)} points of {series.name}",
            steps=(float(series.steps[-tail]), float(series.steps[-1])),
        )


@check(
    "GRAD.RISING",
    "gradients rise together with loss trouble",
    "minor",
    needs=("grad_trend", "trend"),
    threshold="a monotone rise of the gradient norm (Mann-Kendall z > 3.3) by 3 times, and the loss rises "
    "too; alone it is "
    "normal late in a run",
    recommendation=("lower the learning rate or add weight decay",),
    verify="the norm levels off",
)
def rising(subject: Subject) -> Iterator[Found]:
    """Rising norms beside a rising loss."""
    series = finite_series(subject, "grad_norm")
    levels = blocks(series.values).levels[1:]
    if (
        len(levels) > 6
        and mann_kendall(levels) > 3.3
        and levels[-1] > 3 * levels[0] > 0
        and rise_of(subject) is not None
    ):
        yield Found(
            f"{series.name} rises from {levels[0]:.3g} to {levels[-1]:.3g}",
            (at(series, len(series) - 1),),
            power=f"{len(series)} points of {series.name}",
        )


@check(
    "GRAD.ABSURD_SCALE",
    "gradient norms out of proportion",
    "minor",
    needs=("grad_norm", "train_loss"),
    threshold="the median gradient norm is above 1e4 while the loss is below 100",
    alternatives=("a norm that is logged before the loss scale is divided out", "a sum over parameters"),
    recommendation=("divide by the loss scale before logging and clipping",),
    verify="clipping at 1 changes less than half of the steps",
)
def absurd(subject: Subject) -> Iterator[Found]:
    """Large norms beside a sane loss."""
    series, loss = finite_series(subject, "grad_norm"), subject.loss
    assert loss is not None
    if np.median(series.values) > 1e4 and np.median(np.abs(loss.values)) < 100:
        yield Found(
            f"{series.name} has the median {np.median(series.values):.3g}",
            (at(series, len(series) // 2),),
            power=f"{len(series)} points of {series.name}",
        )


@check(
    "GRAD.CLIP_RATE",
    "clipping acts always or never",
    "info",
    needs=("grad_trend",),
    threshold="after the first tenth more than 95 % or less than 0.1 % of the norms are above the clip norm",
    recommendation=(
        "with always: the clip norm is the step size, set it knowingly; with never: it protects from nothing yet",
    ),
    verify="5 to 50 % of the steps are clipped",
)
def clip_rate(subject: Subject) -> Iterator[Found]:
    """Share of norms above the clip norm."""
    clip, series = subject.setting("clip"), finite_series(subject, "grad_norm")
    if clip is None or not clip.number:
        raise NotAssessed("log the norm at which gradients are clipped")
    late = series.values[len(series) // 10 :]
    share = float((late > clip.number).mean())
    if share > 0.95 or (share < 0.001 and len(late) >= 1000):
        yield Found(
            f"{100 * share:.1f} % of {len(late)} gradient norms are above {clip.number:g}",
            (stated(clip),),
            power=f"{len(series)} points of {series.name}",
        )


@check(
    "GRAD.NOISE_SCALE",
    "the batch does not fit the noise of the gradient",
    "info",
    needs=("grad_noise_scale",),
    threshold="the batch is below a tenth of, or above ten times, the median simple noise scale of 20 points or more",
    recommendation=("a batch near the noise scale uses both steps and images well",),
    verify="the loss by images seen does not worsen with the other batch",
    source="McCandlish et al., An Empirical Model of Large-Batch Training, 2018",
)
def noise_scale(subject: Subject) -> Iterator[Found]:
    """Batch against noise scale."""
    series, batch = finite_series(subject, "grad_noise_scale"), subject.number("batch")
    if batch is None:
        raise NotAssessed("log the batch size")
    scale = float(np.median(series.values[len(series) // 4 :]))
    if scale > 0 and not 0.1 <= batch / scale <= 10:
        yield Found(
            f"the batch has {batch:g} images, the noise scale is {scale:.4g}",
            (at(series, len(series) - 1),),
            power=f"{len(series)} points",
            confidence=0.7,
        )


@check(
    "OPT.UPDATE_RATIO",
    "steps too small or too large for the weights",
    "minor",
    needs=("update_ratio",),
    threshold="after the first tenth the median of |update| / |weight| is outside [1e-5, 1e-1]",
    alternatives=("layers that begin at zero", "a learning rate that has decayed to nothing"),
    recommendation=("raise or lower the learning rate by three",),
    verify="the ratio is near 1e-3",
    source="SageMaker Debugger, WeightUpdateRatio, with narrower borders",
)
def update_ratio(subject: Subject) -> Iterator[Found]:
    """Logged ratios."""
    for series in subject.all("update_ratio"):
        value = float(np.median(series.finite.values[len(series) // 10 :]))
        if not 1e-5 <= value <= 1e-1:
            yield Found(
                f"{series.name} has the median {value:.2g}",
                (at(series, len(series) - 1),),
                power=f"{len(series)} points",
            )


@check(
    "PARAM.UNCHANGED",
    "trainable weights do not change",
    "major",
    needs=("param_change",),
    threshold="the change of a group of weights is exactly 0 over 2 points or more and 100 steps after step 1000",
    alternatives=("a zero-initialised gate before it opens, hence step 1000",),
    recommendation=("check that the optimizer was given these parameters", "check for a detach or a dead branch"),
    verify="the change is above 0",
)
def unchanged(subject: Subject) -> Iterator[Found]:
    """Logged changes that are zero."""
    for series in subject.all("param_change"):
        late = series.steps - series.steps[0] >= min(1000.0, 0.5 * (series.steps[-1] - series.steps[0]))
        tail = series.pick(late)
        if len(tail) >= 2 and (tail.values == 0).all() and tail.steps[-1] - tail.steps[0] >= 100:
            yield Found(
                f"{series.name} is 0 from {tail.steps[0]:g} to {tail.steps[-1]:g}",
                (at(tail, 0), at(tail, len(tail) - 1)),
                power=f"{len(tail)} points",
            )


@check(
    "PARAM.DEAD_UNITS",
    "many dead units",
    "minor",
    needs=("dead_units",),
    threshold="the share of units that are never active is above 50 % in the last 3 points",
    recommendation=("lower the learning rate", "use a leaky activation"),
    verify="the share falls below 10 %",
)
def dead_units(subject: Subject) -> Iterator[Found]:
    """Logged shares of dead units."""
    for series in subject.all("dead_units"):
        if (series.values[-3:] > 0.5).all():
            yield Found(
                f"{series.name} is {series.values[-1]:.2f}",
                (at(series, len(series) - 1),),
                power=f"{len(series)} points",
            )


@check(
    "PARAM.ATTN_ENTROPY",
    "attention has collapsed",
    "minor",
    needs=("attention_entropy",),
    threshold="the entropy relative to log n is below 0.1 in the last 3 points",
    recommendation=("normalise queries and keys", "lower the learning rate or lengthen the warm-up"),
    verify="the relative entropy is above 0.3",
    source="Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, 2023",
)
def attention_entropy(subject: Subject) -> Iterator[Found]:
    """Logged entropies."""
    for series in subject.all("attention_entropy"):
        if (series.values[-3:] < 0.1).all():
            yield Found(
                f"{series.name} is {series.values[-1]:.3f}",
                (at(series, len(series) - 1),),
                power=f"{len(series)} points",
            )


def _falling_steadily(subject: Subject) -> tuple[float, float] | None:
    """(fall, fall of the second half), both relative to where they begin, if a loss still falls as fast as it began."""
    loss, curve = subject.loss, subject.curve
    assert loss is not None
    assert curve is not None
    if len(curve) < 12 or loss.values.min() <= 0:
        return None
    third = len(curve) // 4
    first, middle, last = (
        float(np.median(part))
        for part in (curve.levels[: third // 2 + 1], _middle(curve.levels, third), curve.levels[-third:])
    )
    fall, late = (first - last) / first, (middle - last) / middle
    steady = late > 0.1 and fall < 0.5 and (middle - last) > 0.35 * (first - last)
    return (fall, late) if steady and mann_kendall(curve.levels[len(curve) // 2 :]) < -3.3 else None


def _middle(levels: np.ndarray, width: int) -> np.ndarray:
    start = (len(levels) - width) // 2
    return levels[start : start + width]


@check(
    "OPT.LR_TOO_LOW",
    "the learning rate is too low",
    "major",
    needs=("trend", "minimised"),
    threshold="the logged learning rate is 0 throughout; or the loss has lost less than half, and still "
    "falls by 10 % in the second "
    "half as fast as in the first, while its level says that little has been learned (above half of a zero "
    "prediction) or "
    "the peak learning rate is below 2e-6. With neither it is told as info: the run may only have been cut short",
    alternatives=("a run that was cut short", "a fine-tune with a small rate on purpose"),
    recommendation=("try 3 and 10 times the learning rate for a tenth of the run",),
    verify="the loss after a tenth of the run is lower",
)
def lr_too_low(subject: Subject) -> Iterator[Found]:
    """Slow and steady, or no learning rate at all."""
    loss, lr = subject.loss, subject.one("lr")
    assert loss is not None
    peak = float(lr.finite.values.max()) if lr is not None and len(lr.finite) else None
    if peak is not None and peak <= 0 and lr is not None and len(lr) >= 5:
        yield Found(
            f"{lr.name} is {peak:g} at all {len(lr)} points", (at(lr, 0),), confidence=0.95, power=f"{len(lr)} points"
        )
        return
    steady = _falling_steadily(subject)
    if steady is None or rise_of(subject) is not None:
        return
    level = subject.trivial
    untaught = level is not None and loss.values[-1] > 0.5 * level.value and subject.starts_trained is None
    tiny = peak is not None and peak < 2e-6
    text = (
        f"{loss.name} has fallen by {100 * steady[0]:.0f} % and falls on ({100 * steady[1]:.0f} % in the second half)"
    )
    severity = None if untaught or tiny else "info"
    yield Found(
        text + ("" if severity is None else ": cut short, or a learning rate that is too low; the log does not tell"),
        (at(loss, 0), at(loss, len(loss) - 1)),
        severity=severity,
        confidence=0.75 if severity is None else 0.5,
    )


@check(
    "OPT.LR_TOO_HIGH",
    "instabilities at the peak of the learning rate",
    "major",
    needs=("trend", "lr_trend", "minimised"),
    threshold="a lasting rise of the loss begins while the learning rate is at 90 % of its peak or above, "
    "and it was below before",
    alternatives=("a bad batch that happened to come then",),
    recommendation=("lower the peak to a third", "lengthen the warm-up"),
    verify="the loss passes the same step without a rise",
)
def lr_too_high(subject: Subject) -> Iterator[Found]:
    """A rise at the peak."""
    lr, loss, rise = finite_series(subject, "lr"), subject.loss, rise_of(subject)
    assert loss is not None
    if rise is None:
        return
    step = loss.steps[rise.onset]
    now, peak = float(np.interp(step, lr.steps, lr.values)), float(lr.values.max())
    if now >= 0.9 * peak and lr.values[lr.steps < step].min(initial=peak) < 0.5 * peak:
        yield Found(
            f"the loss rises from {step:g} on, where the learning rate is {now:.3g}, its peak {peak:.3g}",
            (at(loss, rise.onset),),
            confidence=0.7,
        )
