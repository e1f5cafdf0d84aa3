"""Held-out losses, scores and memorisation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Found, NotAssessed, at, check
from rqvae.health.log import Series
from rqvae.health.roles import plain_name
from rqvae.health.statistics import level_scale, local_noise
from rqvae.health.subject import Subject

RISE = 0.1


def _turned(series: Series) -> tuple[int, float] | None:
    """(index of the lowest, rise since) where the last two values lie 10 %, and 3 standard deviations, above it."""
    values = series.values
    best = int(np.argmin(values))
    if len(values) - 1 - best < 2:
        return None
    scale = abs(values[best]) if values.min() > 0 else level_scale(values)
    noise = local_noise(values) if len(values) >= 12 else 0.0
    if (values[-2:] > values[best] + max(RISE * scale, 3 * noise)).all():
        return best, float(values[-1] - values[best]) / scale
    return None


@check(
    "GEN.OVERFIT",
    "the held-out loss rises while the training loss falls",
    "major",
    needs=("eval_trend", "train_loss", "minimised"),
    threshold="the last two held-out losses are 10 % (and 3 standard deviations) above the lowest, and the "
    "training loss has not "
    "risen since",
    alternatives=(
        "a score may still improve although the loss rises (Whisper's word error rate does)",
        "held-out data from another distribution",
    ),
    recommendation=(
        "use the checkpoint of the lowest held-out loss",
        "stop earlier, regularise, or add data",
        "judge by the score that matters, not by the loss alone",
    ),
    verify="the held-out loss at the end is within 10 % of its minimum",
    source="SageMaker Debugger, Overfit, with a ratio to the minimum in place of a fixed gap",
)
def overfit(subject: Subject) -> Iterator[Found]:
    """Held-out loss above its minimum."""
    loss = subject.loss
    assert loss is not None
    for series in subject.all("eval_loss"):
        series = series.finite
        turned = _turned(series) if len(series) >= 3 else None
        if turned is None:
            continue
        best, rise = turned
        since, until = (loss.values[p] for p in (loss.steps >= series.steps[best], loss.steps <= series.steps[best]))
        third = max(1, len(since) // 3)
        levels = [float(np.median(part)) for part in (since[:third], until[-third:]) if len(part)]
        if len(since) >= 3 and np.median(since[-third:]) > 1.02 * min(levels):
            continue
        text = (
            f"{series.name} was {series.values[best]:.4g} at {series.steps[best]:g} and is "
            f"{series.values[-1]:.4g} (+{100 * rise:.0f} %)"
        )
        still = _still_better(subject, float(series.steps[best]))
        yield Found(
            text + (f"; {still}" if still else ""),
            (at(series, best, "lowest"), at(series, len(series) - 1, "last")),
            confidence=0.95,
            power=f"{len(series)} evaluations",
            steps=(float(series.steps[best]), float(series.steps[-1])),
        )
        return


def _still_better(subject: Subject, since: float) -> str:
    """Words on a score that improved all the same."""
    for role, sign in (("score_low", -1), ("score_high", 1)):
        for series in subject.all(role):
            before, after = series.values[series.steps <= since], series.values[series.steps > since]
            if len(before) and len(after) and sign * after[-1] > sign * before[-1]:
                return f"{series.name} improves all the same, {before[-1]:.4g} to {after[-1]:.4g}"
    return ""


def _epochs(subject: Subject) -> tuple[np.ndarray, Series]:
    """Epoch at each point of the loss, and the loss."""
    loss = subject.loss
    assert loss is not None
    known = subject.one("epoch")
    if known is not None and len(known.finite) >= 4:
        return np.interp(loss.steps, known.steps, known.values), loss
    marks = [event for event in subject.log.of_kind("epoch") if event.step is not None]
    dataset, batch = subject.number("dataset"), subject.number("batch")
    if dataset and batch and subject.log.unit == "step":
        return loss.steps * batch / dataset, loss
    if len(marks) >= 3:
        lines = np.array([event.line for event in marks])
        return np.searchsorted(lines, loss.lines).astype(float), loss
    raise NotAssessed("log the epoch of each point")


@check(
    "GEN.MEMORISATION_NO_EVAL",
    "memorised, and nobody would see it",
    "major",
    needs=("trend", "minimised"),
    threshold="20 epochs or more, the training loss below 5 % of where it began, and no held-out loss or score",
    alternatives=("a task that can be solved exactly",),
    recommendation=("hold out some percent and log their loss", "compare samples with their nearest training images"),
    verify="a held-out loss within 10 % of its minimum",
)
def memorised(subject: Subject) -> Iterator[Found]:
    """Near-zero loss after many epochs without evaluation."""
    if any(subject.all(role) for role in ("eval_loss", "score_low", "score_high", "held_out")):
        return
    epochs, loss = _epochs(subject)
    begin, end = (float(np.median(part)) for part in (loss.values[:5], loss.values[-max(5, len(loss) // 50) :]))
    if epochs[-1] - epochs[0] >= 20 and 0 <= end < 0.05 * begin:
        text = f"{loss.name} falls from {begin:.3g} to {end:.3g} in {epochs[-1]:.0f} epochs, and nothing is held out"
        yield Found(text, (at(loss, 0), at(loss, len(loss) - 1)), confidence=0.8)


@check(
    "GEN.EPOCH_STAIRCASE",
    "the loss falls in steps at the borders of epochs",
    "major",
    needs=("trend", "minimised"),
    threshold="at 3 borders of epochs or more, and at two of three, the loss drops by 5 % and more than 5 times what "
    "it falls within the epoch before",
    alternatives=("an order of data that repeats", "a schedule that steps with the epoch"),
    recommendation=("samples are recognised: fewer epochs, more data or augmentation", "log a held-out loss"),
    verify="no step at the borders",
    source="Howard and Whitaker, Can LLMs learn from a single example?, fast.ai, 2023",
)
def staircase(subject: Subject) -> Iterator[Found]:
    """Drops at borders against falls within."""
    epochs, loss = _epochs(subject)
    whole = np.floor(epochs + 1e-6)
    borders = [i for i in range(1, len(whole)) if whole[i] > whole[i - 1]]
    marks = [0, *borders, len(whole)]
    per_epoch = np.diff(marks)
    if len(borders) < 3 or np.median(per_epoch) < 8:
        raise NotAssessed("log 8 points an epoch or more, for 4 epochs or more")
    stairs, judged = [], 0
    for before, i, after in zip(marks, borders, marks[2:], strict=False):
        width = max(3, min(i - before, after - i) // 4)
        if i - before < 2 * width or after - i < width:
            continue
        judged += 1
        opening = float(np.median(loss.values[before : before + width]))
        closing = float(np.median(loss.values[i - width : i]))
        drop = closing - float(np.median(loss.values[i : i + width]))
        spread = local_noise(loss.values[before:i]) * 1.25 / np.sqrt(width)
        if drop > max(0.05 * closing, 3 * spread) and drop > 5 * max(opening - closing, 0.0):
            stairs.append(i)
    if len(stairs) >= 3 and 3 * len(stairs) >= 2 * judged:
        text = f"{loss.name} drops at {len(stairs)} of {judged} borders of epochs and hardly within them"
        yield Found(text, tuple(at(loss, i) for i in stairs[:4]), confidence=0.85, power=f"{judged} borders of epochs")


@check(
    "GEN.TOO_EASY",
    "learned too well to be true",
    "major",
    needs=("trend", "minimised"),
    threshold="the loss loses more than 99.9 % within the first 2 % of the steps (3 points or more); or, where a "
    "diffusion states its objective, it ends below 0.3 % of the level of a zero prediction",
    alternatives=("a first value that is off by a scale", "data that are nearly constant"),
    recommendation=("look for the target in the input, for a target that is constant, for a loss over padding",),
    verify="the loss of a model that is given shuffled inputs stays high",
)
def too_easy(subject: Subject) -> Iterator[Found]:
    """A fall by a thousand within 2 % of the run, or an end that no denoiser reaches."""
    loss, level = subject.loss, subject.trivial
    assert loss is not None
    last = float(np.median(loss.values[-max(3, len(loss) // 20) :]))
    if level is not None and level.stated and 0 <= last < 0.003 * level.value:
        text = f"{loss.name} ends at {last:.3g}, {100 * last / level.value:.2f} % of predicting nothing"
        yield Found(text, (at(loss, len(loss) - 1),), confidence=0.8)
        return
    early = loss.pick(loss.steps - loss.steps[0] <= 0.02 * float(loss.steps[-1] - loss.steps[0]))
    if len(early) < 3:
        raise NotAssessed("log 3 points or more within the first 2 % of the run")
    if loss.values.min() >= 0 and np.median(early.values[-2:]) < 0.001 * loss.values[0]:
        text = f"{loss.name} falls from {loss.values[0]:.3g} to {early.values[-1]:.3g} by {early.steps[-1]:g}"
        yield Found(text, (at(loss, 0), at(early, len(early) - 1)), confidence=0.8)


_SCORES_OF_SAMPLES = ("fid", "kid", "wer", "cer", "perplexity", "ppl", "lpips")


@check(
    "EVAL.SCORE_RISING",
    "a score gets worse",
    "major",
    needs=("score",),
    threshold="the last two values of FID, KID, WER or another score that should fall are 10 % above the "
    "lowest (4 values or more)",
    alternatives=("a score of few samples is noisy: FID of 1000 images moves by some percent",),
    recommendation=("use the checkpoint of the lowest score", "look for overfitting or mode collapse"),
    verify="the score at the end is within 10 % of its minimum",
)
def score_rising(subject: Subject) -> Iterator[Found]:
    """Scores that should fall."""
    enough = False
    for series in subject.all("score_low"):
        series = series.finite
        named = any(word in plain_name(series.name) for word in _SCORES_OF_SAMPLES)
        if len(series) < 4 or not named or plain_name(series.name).startswith("train_"):
            continue
        enough = True
        turned = _turned(series)
        if turned is not None:
            best, rise = turned
            text = (
                f"{series.name} was {series.values[best]:.4g} at {series.steps[best]:g} and is "
                f"{series.values[-1]:.4g} (+{100 * rise:.0f} %)"
            )
            yield Found(
                text,
                (at(series, best, "lowest"), at(series, len(series) - 1)),
                confidence=0.85,
                power=f"{len(series)} values",
                steps=(float(series.steps[best]), float(series.steps[-1])),
            )
    if not enough:
        raise NotAssessed("log a score such as FID at 4 steps or more")


@check(
    "EVAL.MISSING",
    "nothing is held out",
    "info",
    needs=("train_loss",),
    threshold="no held-out loss and no score anywhere in the log",
    recommendation=("log a held-out loss on fixed noise and timesteps, and a score of samples now and then",),
    verify="the log has a held-out loss",
)
def eval_missing(subject: Subject) -> Iterator[Found]:
    """No held-out series."""
    roles = ("eval_loss", "score_low", "score_high", "held_out", "ema_eval")
    if not any(subject.all(role) for role in roles):
        yield Found("the log has no held-out loss and no score", confidence=0.95, power="all series were looked at")


@check(
    "SCALE.ACCUM_NOT_DIVIDED",
    "the training loss is summed over accumulated batches",
    "major",
    needs=("train_loss", "eval_loss", "minimised"),
    threshold="training over held-out loss stays within 20 % of the stated accumulation (4 or more); where "
    "it is not stated, "
    "within 12 % of 4, 8, 16, 32 or 64 at 3 evaluations or more, and constant to 15 %",
    alternatives=("held-out data that are easier", "strong dropout or augmentation, which do not reach a factor 4"),
    recommendation=(
        "divide the loss by the number of accumulated batches, before backward",
        "update the training library",
    ),
    verify="training and held-out loss agree to some percent at the first evaluation",
    source="huggingface/transformers, the gradient accumulation fix of October 2024",
)
def not_divided(subject: Subject) -> Iterator[Found]:
    """Ratio of training to held-out loss."""
    loss, stated = subject.loss, subject.number("accumulation")
    held_out = max((s.finite for s in subject.all("eval_loss")), key=len)
    assert loss is not None
    if len(loss) < 5 or loss.values.min() <= 0 or held_out.values.min() <= 0:
        raise NotAssessed("log training and held-out loss, both positive")
    window = max(1, len(loss) // max(4 * len(held_out), 1))
    near = [
        float(np.median(loss.values[np.argsort(np.abs(loss.steps - step))[: 2 * window + 1]]))
        for step in held_out.steps
    ]
    ratios = np.array(near) / held_out.values
    ratio = float(np.median(ratios))
    constant = ratios.std() < 0.15 * ratio
    if stated and stated >= 4:
        fits, factor = constant and abs(ratio / stated - 1) < 0.2, stated
    else:
        factor = float(2 ** np.clip(np.round(np.log2(max(ratio, 1.0))), 2, 6))
        fits = bool(constant and len(ratios) >= 3 and abs(ratio / factor - 1) < 0.12)
    if fits:
        text = (
            f"{loss.name} is {ratio:.2f} times {held_out.name} at {len(ratios)} evaluations: summed over "
            f"{factor:g} batches"
        )
        yield Found(text, (at(held_out, 0), at(held_out, len(held_out) - 1)), confidence=0.9 if stated else 0.75,
                    power=f"{len(ratios)} evaluations")  # fmt: skip
