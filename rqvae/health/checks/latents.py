"""Latents, conditions and the sampler of data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rqvae.health.finding import Evidence, Found, NotAssessed, at, check, stated
from rqvae.health.settings import as_list
from rqvae.health.statistics import binomial_p
from rqvae.health.subject import Subject

_DRAWS = 30


@check(
    "LATENT.SCALE",
    "latents are not of unit scale",
    "major",
    needs=("latent_std",),
    threshold="their standard deviation is outside [0.5, 2]",
    recommendation=(
        "divide by the measured standard deviation, per channel",
        "store scale and shift in the checkpoint",
    ),
    verify="the standard deviation over 64 batches is within [0.8, 1.25]",
    source="Rombach et al. 2022, appendix G: rescaled to unit standard deviation",
)
def latent_scale(subject: Subject) -> Iterator[Found]:
    """Logged standard deviations."""
    for series in subject.all("latent_std"):
        value = float(np.median(series.finite.values))
        if not 0.5 <= value <= 2:
            yield Found(f"{series.name} is {value:.3g}", (at(series, len(series) - 1),), power=f"{len(series)} points")


@check(
    "LATENT.SHIFT",
    "latents are shifted",
    "major",
    needs=("latent_mean",),
    threshold="the absolute mean is above 0.5",
    recommendation=("subtract the measured mean, per channel, and add it back before decoding",),
    verify="the absolute mean over 64 batches is below 0.1",
)
def latent_shift(subject: Subject) -> Iterator[Found]:
    """Logged means."""
    for series in subject.all("latent_mean"):
        value = float(np.median(series.finite.values))
        if abs(value) > 0.5:
            yield Found(f"{series.name} is {value:.3g}", (at(series, len(series) - 1),), power=f"{len(series)} points")


@check(
    "VAE.ROUNDTRIP",
    "the autoencoder loses the image",
    "major",
    needs=("latent_psnr",),
    threshold="encoding and decoding has a PSNR below 20 dB",
    alternatives=("images that are noise-like",),
    recommendation=("check the range that the VAE expects ([-1, 1] for those of Stable Diffusion)", "train it further"),
    verify="the PSNR of 64 images is above 25 dB",
)
def roundtrip(subject: Subject) -> Iterator[Found]:
    """Logged PSNR."""
    for series in subject.all("latent_psnr"):
        value = float(np.median(series.finite.values))
        if value < 20:
            yield Found(
                f"{series.name} is {value:.3g} dB", (at(series, len(series) - 1),), power=f"{len(series)} points"
            )


@check(
    "COND.MASK_IGNORED",
    "the network ignores its condition",
    "critical",
    needs=("mask_probe",),
    threshold="loss under shuffled conditions and loss under the right ones differ by less than 1 % in the "
    "last 3 probes",
    alternatives=("conditions that carry nothing about the image",),
    recommendation=("check that the condition reaches the network and has a gradient", "check that it is spatial"),
    verify="the loss under shuffled conditions is higher by some percent",
)
def mask_ignored(subject: Subject) -> Iterator[Found]:
    """The probe against the loss at the same steps."""
    probe, right = subject.one("mask_shuffled"), subject.one("mask_right") or subject.loss
    assert probe is not None
    if right is None or len(right) == 0:
        raise NotAssessed("log the loss under the right conditions beside the probe")
    same = np.interp(probe.steps, right.steps, right.values)
    gap = np.abs(probe.values / same - 1)[-3:]
    if (gap < 0.01).all():
        text = f"{probe.name} differs from {right.name} by {100 * gap.max():.2f} % at most in the last 3 probes"
        yield Found(text, (at(probe, len(probe) - 1),), power=f"{len(probe)} probes")


@check(
    "VAE.INPUT_RANGE",
    "the VAE gets another range than it expects",
    "major",
    needs=("input_range", "source"),
    threshold="the log shows inputs within [0, 1], and the source encodes them without bringing them to [-1, 1]",
    alternatives=("a VAE that was trained on [0, 1]",),
    recommendation=("encode 2 * image - 1 and map the decoder's output back",),
    verify="the log shows a minimum near -1 at the VAE, and the PSNR of encode and decode rises",
    source="diffusers, VaeImageProcessor: images are normalised to [-1, 1] before AutoencoderKL.encode",
)
def input_range(subject: Subject) -> Iterator[Found]:
    """Range in the log, normalisation in the source."""
    from rqvae.health.checks.source_diffusion import encodes_raw

    low, high = subject.segment.series["input/low"], subject.segment.series["input/high"]
    assert subject.source is not None
    if low.values.min() < 0 or high.values.max() > 1.01:
        return
    for file, call in encodes_raw(subject.source):
        where = Evidence(file.text(call), call.lineno, file.name)
        text = f"images in [{low.values.min():g}, {high.values.max():g}] are encoded as they are"
        yield Found(text, (at(low, 0), where), confidence=0.85, power=f"{len(low)} batches, and the source")
        return


@check(
    "COND.SAMPLER_MISMATCH",
    "the sampler does not draw what it declares",
    "major",
    needs=("draws",),
    threshold="the share of class 0 among 30 draws or more rejects the declared one with p < 1e-4, exact and two-sided",
    alternatives=("draws of another loader that are mixed in",),
    recommendation=("print the cumulative probabilities and test 1000 draws before training",),
    verify="1000 draws have p > 0.01",
)
def sampler(subject: Subject) -> Iterator[Found]:
    """Exact binomial test on the draws in the log."""
    draws = subject.segment.series["draw/class"]
    declared = next((s for s in subject.stated if s.key == "Individual probabilities"), None)
    shares = as_list(declared.value) if declared else None
    if declared is None or shares is None:
        raise NotAssessed("log the probabilities that the sampler was given")
    if len(draws) < _DRAWS:
        raise NotAssessed(f"log {_DRAWS} draws or more, there are {len(draws)}")
    hits = int((draws.values == 0).sum())
    p = binomial_p(hits, len(draws), shares[0])
    if p < 1e-4:
        text = f"{hits} of {len(draws)} draws are of class 0 where {shares[0]:g} was declared (p = {p:.1g})"
        yield Found(text, (stated(declared), at(draws, 0)), confidence=0.95, power=f"{len(draws)} draws")


@check(
    "COND.DROP_SEMANTICS",
    "a drop probability that is a keep probability",
    "major",
    needs=(),
    threshold="a declared drop probability p other than 0.5 goes with a share of unconditional draws of 1 - p in the "
    "printed probabilities of the same block",
    recommendation=("name a keep probability p_cond, or turn its meaning round; refuse a config that states both",),
    verify="with a drop probability of 0.1 a tenth of the draws has no condition",
)
def drop_semantics(subject: Subject) -> Iterator[Found]:
    """The printed probability against the printed distribution."""
    settings = subject.stated
    if not any(setting.key == "Conditional drop probability" for setting in settings):
        raise NotAssessed("log the drop probability and the probabilities of the sampler")
    for i, setting in enumerate(settings):
        if setting.key != "Conditional drop probability":
            continue
        follow = next((s for s in settings[i : i + 3] if s.key == "Individual probabilities"), None)
        shares, p = as_list(follow.value) if follow else None, setting.number
        if follow and shares and p is not None and p != 0.5 and abs(shares[0] - (1 - p)) < 1e-3:
            text = (
                f"with a drop probability of {p:g} the unconditional class has probability {shares[0]:g}, that is 1 - p"
            )
            yield Found(text, (stated(setting), stated(follow)), confidence=0.95, power="stated")
            return


@check(
    "COND.TRAIN_SAMPLE_MISMATCH",
    "sampling is conditioned on what training never saw",
    "major",
    needs=("conditions",),
    threshold="conditions of training mix 3 classes or more in a fifth of the rows or more, those of "
    "sampling never more than 2",
    alternatives=("a log that shows few sampling calls",),
    recommendation=("condition on the whole mask at sampling too", "or train on one class at a time"),
    verify="rows of both have the same distribution of classes",
)
def train_sample(subject: Subject) -> Iterator[Found]:
    """Number of classes a condition mixes."""
    train = subject.segment.series["condition/classes_train"]
    sampling = subject.segment.series["condition/classes_sampling"]
    if len(train) < 4 or len(sampling) < 4:
        raise NotAssessed("log 4 conditions or more of training and of sampling")
    mixed = float((train.values >= 3).mean())
    if mixed >= 0.2 and sampling.values.max() <= 2:
        text = (
            f"{100 * mixed:.0f} % of {len(train)} training rows mix 3 classes or more, none of "
            f"{len(sampling)} sampling rows"
        )
        first = int(np.argmax(train.values >= 3))
        yield Found(
            text, (at(train, first), at(sampling, 0)), confidence=0.85, power=f"{len(train)} and {len(sampling)} rows"
        )
