"""What only diffusion runs have: a loss whose trivial level is known, timesteps, latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.checks.loss import is_flat
from rqvae.health.finding import Found, NotAssessed, at, check, stated
from rqvae.health.log import Series
from rqvae.health.rise import RISE, lasting_rise
from rqvae.health.statistics import blocks, chi_square_p, local_noise, lowest_level
from rqvae.health.subject import Level, Subject

_DRAWS = 30


def _level(subject: Subject) -> tuple[Series, Level]:
    loss, level = subject.loss, subject.trivial
    assert loss is not None
    assert level is not None
    return loss, level


def _words(level: Level) -> str:
    sure = "the loss of" if level.stated else "consistent with"
    return f"{sure} predicting nothing ({level.objective}: {level.value:g})"


@check(
    "DIFF.TRIVIAL_PREDICTOR",
    "the network predicts nothing",
    "critical",
    needs=("diffusion", "train_loss", "objective"),
    threshold="the loss was below 0.8 of the level of a zero prediction, comes back to within 7 % of it and "
    "stays there for "
    "the last three points or more (the last block); or it never leaves that level in 50 points or more",
    alternatives=("a loss that only happens to have that level, where the objective is not stated",),
    recommendation=(
        "stop: samples of this network are noise",
        "resume from before the collapse with a lower learning rate",
        "look for weights or activations that are not finite and are hidden by nan_to_num",
    ),
    verify="the loss falls below 0.8 of the level again",
    source="unit-variance noise: E|0 - eps|^2 = 1, E|0 - eps| = sqrt(2/pi) = 0.798; velocity noise - x0: 1 + Var(x0)",
)
def trivial(subject: Subject) -> Iterator[Found]:
    """Back at, or never away from, the level of a zero prediction."""
    loss, level = _level(subject)
    if len(loss) < 13:
        raise NotAssessed(f"log 13 points or more, there are {len(loss)}")
    inside = (loss.values >= level.low) & (loss.values <= level.high)
    run = (
        len(loss) - int(np.argmin(inside[::-1]) and len(loss) - np.argmin(inside[::-1]))
        if not inside.all()
        else len(loss)
    )
    last = blocks(loss.values).levels[-1]
    at_level = run >= 3 or (level.low <= last <= level.high and local_noise(loss.values) < 0.3 * level.value)
    if not at_level:
        return
    earlier = loss.values[: len(loss) - max(run, 3)]
    learned = len(earlier) > 3 and float(np.percentile(earlier, 20)) < 0.8 * level.value
    tail = float(np.median(loss.values[-max(3, min(run, 50)) :]))
    if learned and np.median(loss.values[-max(run, 3) - 20 : -max(run, 3)]) < 0.9 * level.low:
        begin = len(loss) - max(run, 3)
        text = f"{loss.name} was {np.median(earlier):.4g}, is {tail:.4g} from {loss.steps[begin]:g} on: {_words(level)}"
        yield Found(
            text,
            (at(loss, begin - 1, "before"), at(loss, begin), at(loss, len(loss) - 1)),
            confidence=0.95 if level.stated else 0.75,
            power=f"{len(loss)} points, the last {run} at the level",
            steps=(float(loss.steps[begin]), float(loss.steps[-1])),
        )
    elif len(loss) >= 50 and inside.mean() > 0.9 and is_flat(subject) and level.objective != "velocity":
        text = f"{loss.name} stays at {tail:.4g} from its first point on: {_words(level)}"
        yield Found(
            text,
            (at(loss, 0), at(loss, len(loss) - 1)),
            confidence=0.9 if level.stated else 0.6,
            steps=(float(loss.steps[0]), float(loss.steps[-1])),
        )


@check(
    "DIFF.INIT_LEVEL",
    "the first losses are not those of a new network",
    "major",
    needs=("diffusion", "train_loss", "objective"),
    threshold="where the objective is stated and no weights were loaded: the median of the first losses (3 "
    "or more, within "
    "the first 20 steps) is above 1.5 of the level of a zero prediction, or (info: weights may have been "
    "loaded) below 0.5",
    alternatives=(
        "a log that begins late",
        "a learning rate so high that the first steps do harm",
        "weights that were loaded without a word in the log",
    ),
    recommendation=("check the scale of latents and noise: the target's variance must be 1", "check a sum for a mean"),
    verify="the first loss is within 10 % of the level",
)
def first_level(subject: Subject) -> Iterator[Found]:
    """First losses against the known level."""
    loss, level = _level(subject)
    early = loss.values[loss.steps <= 20][:20]
    if not level.stated or subject.starts_trained is not None:
        raise NotAssessed("log the objective and whether weights were loaded")
    if len(early) < 3 or len(loss) < 10:
        raise NotAssessed(f"log each of the first 20 steps, there are {len(early)} of them in {len(loss)} points")
    median = float(np.median(early))
    if median > 1.5 * level.high or median < 0.5 * level.low:
        text = (
            f"the first {len(early)} values of {loss.name} have the median {median:.4g}; a zero "
            f"prediction has {level.value:g}"
        )
        yield Found(
            text,
            (at(loss, 0), at(loss, len(early) - 1)),
            confidence=0.8,
            severity="info" if median < level.value else None,
            power=f"{len(early)} points",
        )


def _bins(subject: Subject) -> list[Series]:
    bins = [series.finite for series in subject.all("t_bin")]
    return [series for series in bins if len(series) >= 10]


@check(
    "DIFF.BIN_DOMINANCE",
    "one range of timesteps makes the loss",
    "minor",
    needs=("t_bins",),
    threshold="over the second half one timestep bin has more than 90 % of the sum of all bins",
    alternatives=("a loss weight by timestep that is meant to do this (a variational bound does)",),
    recommendation=("weight the loss by timestep (min-SNR, P2) or predict v", "draw timesteps by importance"),
    verify="no bin has more than 90 %, and the score does not fall",
    source="Nichol & Dhariwal 2021, section 3.3; Hang et al., min-SNR, 2023",
)
def dominance(subject: Subject) -> Iterator[Found]:
    """Share of the largest bin."""
    bins = _bins(subject)
    if len(bins) < 2:
        raise NotAssessed("log the loss by timestep at 10 steps or more")
    levels = {series.name: float(np.mean(series.values[len(series) // 2 :])) for series in bins}
    total = sum(levels.values())
    name = max(levels, key=lambda n: levels[n])
    if min(levels.values()) >= 0 and total > 0 and levels[name] > 0.9 * total:
        series = next(s for s in bins if s.name == name)
        text = f"{name} has {100 * levels[name] / total:.1f} % of the sum of {len(bins)} timestep bins"
        yield Found(text, (at(series, len(series) - 1),), confidence=0.95, power=f"{len(series)} points a bin")


@check(
    "DIFF.BIN_REGRESSION",
    "a range of timesteps gets worse while the mean improves",
    "major",
    needs=("t_bins", "trend"),
    threshold="the last three block medians of a bin lie above the lowest level that it held by 20 % and 6 "
    "median absolute "
    "deviations, while the mean loss of the second half does not rise",
    alternatives=("a timestep distribution that was changed on purpose",),
    recommendation=("weight the bins, or draw them evenly", "look at samples after few and after many steps"),
    verify="the bin's level falls again",
)
def regression(subject: Subject) -> Iterator[Found]:
    """A bin that rises under a falling mean."""
    bins = [series for series in _bins(subject) if len(series) >= 20]
    if not bins:
        raise NotAssessed("log the loss by timestep at 20 steps or more")
    loss, _ = _level(subject) if subject.trivial else (subject.loss, None)
    assert loss is not None
    if lasting_rise(loss.values, blocks(loss.values)) is not None:
        return
    for series in bins:
        curve = blocks(series.values)
        rise = lasting_rise(series.values, curve)
        if rise is not None and len(curve) >= 8 and curve.levels[-1] > (1 + RISE) * lowest_level(curve.levels, 4):
            text = f"{series.name} rises from {rise.base:.4g} to {rise.tail:.4g} while {loss.name} does not rise"
            yield Found(
                text,
                (at(series, rise.onset), at(series, len(series) - 1)),
                confidence=0.85,
                power=f"{len(series)} points of {series.name}",
                steps=(float(series.steps[rise.onset]), float(series.steps[-1])),
            )


@check(
    "DIFF.T_COVERAGE",
    "timesteps are not drawn as they should be",
    "major",
    needs=("timestep_draws",),
    threshold="30 draws or more in quarters of the range differ from even ones with p < 1e-4 (chi square), "
    "or all are equal",
    alternatives=("a distribution that is not uniform on purpose (logit-normal, importance)",),
    recommendation=("draw torch.randint(0, T, (batch,)) anew at each step",),
    verify="a histogram of 1000 draws",
)
def coverage(subject: Subject) -> Iterator[Found]:
    """Chi square of the drawn timesteps in quarters."""
    draws = subject.segment.series["draw/timestep"]
    if len(draws) < _DRAWS:
        raise NotAssessed(f"log {_DRAWS} drawn timesteps or more, there are {len(draws)}")
    total = subject.number("timesteps") or 1000.0
    observed, _ = np.histogram(draws.values, bins=4, range=(0, total))
    p = chi_square_p(observed.astype(float), np.full(4, len(draws) / 4))
    if p < 1e-4 and not any("lognorm" in f"{s.key}{s.value}".lower() for s in subject.stated):
        text = (
            f"{len(draws)} timesteps fall into quarters of 0..{total:g} as {observed.tolist()} (p = "
            f"{p:.1g} for even draws)"
        )
        yield Found(text, (at(draws, 0), at(draws, len(draws) - 1)), confidence=0.95, power=f"{len(draws)} draws")


@check(
    "SCALE.LOSS_ABSURD",
    "a loss of that size is no mean of unit-variance errors",
    "critical",
    needs=("diffusion", "train_loss"),
    threshold="the median of the second half is above 50; minor with a stated sum reduction or a variational bound",
    alternatives=("a loss that is summed over pixels", "a variational bound in bits"),
    recommendation=("check the scale of images or latents (divide by 255, apply the VAE's scale)", "take the mean"),
    verify="the first loss is within 10 % of 1 (eps, v) or 1 + Var(x0) (velocity)",
)
def absurd(subject: Subject) -> Iterator[Found]:
    """Level above what any unit-variance target allows."""
    loss = subject.loss
    assert loss is not None
    if len(loss) < 5:
        raise NotAssessed(f"log 5 points or more, there are {len(loss)}")
    median = float(np.median(loss.values[len(loss) // 2 :]))
    text = " ".join(f"{s.key} {s.value}" for s in subject.stated).lower()
    summed = any(word in text for word in ("reduction sum", "use_kl true", "_kl", "rescale_kl", "nll"))
    if median > 50:
        yield Found(
            f"the second half of {loss.name} has the median {median:.4g}",
            (at(loss, len(loss) - 1),),
            severity="minor" if summed else None,
            confidence=0.6 if summed else 0.9,
        )


@check(
    "DIFF.STEPS_DIFFER",
    "sampling and training disagree about timesteps",
    "minor",
    needs=("diffusion",),
    threshold="more sampling steps are configured than there are timesteps",
    recommendation=("set sampling_timesteps to the number of timesteps or fewer",),
    verify="the sampler starts",
)
def sampling_steps(subject: Subject) -> Iterator[Found]:
    """Config against config."""
    total = subject.setting("timesteps")
    wanted = next(
        (s for s in subject.stated if s.key.rpartition(".")[2] in ("sampling_timesteps", "num_sampling_steps")), None
    )
    if total is None or wanted is None or total.number is None or wanted.number is None:
        raise NotAssessed("log timesteps and sampling steps")
    if wanted.number > total.number:
        yield Found(
            f"{wanted.value} sampling steps of {total.value} timesteps", (stated(total), stated(wanted)), power="stated"
        )
