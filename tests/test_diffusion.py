"""Laws of times, guidance and the sampler against closed forms, scipy and diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats
from torch import Tensor

from rqvae.diffusion import (
    VP,
    Autoguidance,
    ClassifierFree,
    Denoiser,
    Interval,
    KeyedNoise,
    LogitNormal,
    Sampler,
    Shifted,
    TimestepLaw,
    Uniform,
    heun,
    sampling_times,
)
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition
from rqvae.randomness import generator

F64 = torch.float64
PREDICTIONS = ("velocity", "x0", "eps")


LAWS = [
    (Uniform(), lambda t: t),
    (LogitNormal(0.4, 0.7), lambda t: stats.norm(0.4, 0.7).cdf(np.log(t / (1 - t)))),
    # P(shifted <= t) = P(base <= t / (s - (s - 1) t)), the inverse of SD3's eq. 23
    (Shifted(3.0), lambda t: t / (3 - 2 * t)),
    (Shifted(0.5, LogitNormal()), lambda t: stats.norm.cdf(np.log(t / (1 - t)) - math.log(0.5))),
]


@pytest.mark.parametrize(("law", "cdf"), LAWS, ids=lambda x: type(x).__name__)
def test_law_has_its_distribution(law: TimestepLaw, cdf: Any) -> None:
    t = law((20_000,), generator=generator(3))
    assert t.dtype == torch.float32
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 0.01
    assert torch.equal(t, law((20_000,), generator=generator(3)))
    assert law((), generator=generator(0)).shape == ()


@pytest.mark.parametrize("law", [LogitNormal(30.0), LogitNormal(-120.0), Shifted(1e9), Shifted(1e-12)])
def test_law_stays_inside_the_open_interval(law: TimestepLaw) -> None:
    t = law((1000,), generator=generator(0))
    assert ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_sampling_times_are_those_of_diffusers(shift: float) -> None:
    steps = 7
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    times = sampling_times(steps, shift)
    assert times.dtype == F64
    assert times[0] == 1
    assert times[-1] == 0
    torch.testing.assert_close(times.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def labelled_velocity(x: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
    """A velocity whose every channel depends on the label."""
    channels = torch.arange(1, 1 + x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
    return x * t + channels * (condition.label + 1).view(-1, 1, 1, 1)


def test_guidance_acts_on_every_channel_of_the_latent() -> None:
    x, t = torch.randn(3, 5, 2, 2, dtype=F64, generator=generator(0)), torch.tensor(0.5, dtype=F64)
    condition = ClassCondition(torch.tensor([0, 4, 2]), 10)
    conditional = labelled_velocity(x, t, condition)
    null = labelled_velocity(x, t, condition.null())
    for scale in (0.0, 0.5, 1.0, 4.0):
        guided = ClassifierFree(scale)(labelled_velocity, x, t, condition)
        torch.testing.assert_close(guided, null + scale * (conditional - null), rtol=1e-13, atol=1e-13)
    changed = (ClassifierFree(4.0)(labelled_velocity, x, t, condition) - conditional).abs().amin((0, 2, 3))
    assert (changed > 0.1).all()


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [3]), (2.0, [6])])
def test_guidance_is_one_forward_and_scale_one_skips_the_null_half(scale: float, rows: list[int]) -> None:
    seen = []

    def velocity(x: Tensor, t: Tensor, condition: ActionCondition) -> Tensor:
        assert len(x) == len(condition.actions) == len(condition.mask) == len(condition.context)
        seen.append(len(x))
        return x

    condition = ActionCondition(torch.rand(3, 2, 3, 4, 4), torch.zeros(3, 2).long(), torch.ones(3, 2).bool(), 5)
    ClassifierFree(scale)(velocity, torch.zeros(3, 1), torch.tensor(0.5), condition)
    assert seen == rows


def test_interval_guides_inside_only_and_evaluates_no_null_rows_outside() -> None:
    """Rows through the network: 2 B in the steps whose time is in (0.35, 0.85], B in all others."""
    rows: dict[float, int] = {}

    def predict(x: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        assert len(x) == len(condition)
        rows[round(float(t), 6)] = len(x)
        return labelled_velocity(x, t, condition)

    x = torch.randn(3, 5, 2, 2, dtype=F64, generator=generator(0))
    condition = ClassCondition(torch.tensor([0, 4, 2]), 10)
    guidance = Interval(3.0, start=0.35, end=0.85)
    _, nfe = Sampler(steps=10, guidance=guidance)(predict, x, condition)
    assert nfe == 10
    assert rows == {round(i / 10, 6): 6 if 3 < i <= 8 else 3 for i in range(1, 11)}
    for t in (0.36, 0.85):
        time = torch.tensor(t, dtype=F64)
        expected = ClassifierFree(3.0)(labelled_velocity, x, time, condition)
        assert torch.equal(guidance(labelled_velocity, x, time, condition), expected)
    outside = torch.tensor(0.35, dtype=F64)
    assert torch.equal(guidance(labelled_velocity, x, outside, condition), labelled_velocity(x, outside, condition))
    assert guidance.needs_null
    assert not Interval(1.0).needs_null


def test_autoguidance_extrapolates_from_the_guide_with_b_rows_in_each() -> None:
    rows = {"model": 0, "guide": 0}

    def model(x: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        rows["model"] += len(x)
        return labelled_velocity(x, t, condition)

    def guide(x: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        rows["guide"] += len(x)
        return 0.5 * labelled_velocity(x, t, condition)

    x, t = torch.randn(3, 5, 2, 2, dtype=F64, generator=generator(0)), torch.tensor(0.5, dtype=F64)
    condition = ClassCondition(torch.tensor([0, 4, 2]), 10)
    answer = labelled_velocity(x, t, condition)
    torch.testing.assert_close(Autoguidance(guide, 2.5)(model, x, t, condition), (0.5 + 2.5 * 0.5) * answer)
    assert rows == {"model": 3, "guide": 3}
    assert torch.equal(Autoguidance(guide, 1.0)(model, x, t, condition), answer)
    assert rows == {"model": 6, "guide": 3}
    assert not Autoguidance(guide).needs_null


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_guiding_any_prediction_is_guiding_the_velocity(prediction: Any) -> None:
    path, condition = VP("cosine"), ClassCondition(torch.tensor([0, 4, 2]), 10)
    x = torch.randn(3, 5, 2, 2, dtype=F64, generator=generator(0))

    def as_prediction(x: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        return Denoiser(lambda x, t: labelled_velocity(x, t, condition), path).at(x, t, prediction)[0]

    sampler = Sampler(heun, steps=4, start=0.99, guidance=ClassifierFree(3.0))
    velocity, _ = sampler(labelled_velocity, x, condition, path=path)
    other, _ = sampler(as_prediction, x, condition, path=path, prediction=prediction)
    torch.testing.assert_close(other, velocity, rtol=1e-9, atol=1e-9)


def test_step_noise_is_normal_and_belongs_to_the_sample() -> None:
    initial = torch.randn(64, 4, 8, 8, generator=generator(0))
    noise = KeyedNoise(initial)
    steps = torch.stack([noise(i) for i in range(4)])
    for rows in (slice(0, 1), slice(5, 9), slice(3, 64, 7)):
        assert torch.equal(KeyedNoise(initial[rows])(2), steps[2, rows])
    assert torch.equal(KeyedNoise(initial.double())(1), steps[1].double())
    assert stats.kstest(steps.flatten().numpy(), "norm").pvalue > 0.01
    flat = torch.cat((initial[None], steps)).flatten(2).transpose(0, 1).reshape(64 * 5, -1)
    correlations = torch.corrcoef(flat).fill_diagonal_(0).abs().amax()
    assert correlations < 6 / math.sqrt(flat.shape[1])


def test_times_begin_at_start_and_have_no_empty_step() -> None:
    for start, shift, steps in ((0.5, 1.0, 10), (0.999, 3.0, 1000), (0.2, 0.3, 7)):
        times = Sampler(steps=steps, shift=shift, start=start).times()
        assert len(times) == steps + 1
        assert (times[0], times[-1]) == (start, 0)
        assert (times.diff() < 0).all()


def test_guidance_without_a_condition_is_refused() -> None:
    with pytest.raises(BadInput, match="condition: expected one for guidance of scale 2, got None"):
        ClassifierFree(2.0)(labelled_velocity, torch.zeros(1, 1, 1, 1), torch.tensor(0.5), None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampler(steps=0), "sampler.steps: expected a whole number >= 1, got 0"),
        (lambda: Sampler(shift=0.0), "sampler.shift: expected a number > 0, got 0"),
        (lambda: Sampler(start=0.0), r"sampler.start: expected a number in \(0, 1\], got 0"),
        (lambda: Interval(2.0, 0.6, 0.6), "guidance: expected 0 <= start < end <= 1, got start 0.6, end 0.6"),
        (lambda: LogitNormal(std=0.0), "timesteps.std: expected a number > 0, got 0"),
        (lambda: Shifted(-1.0), "timesteps.shift: expected a number > 0, got -1"),
    ],
)
def test_bad_settings_are_named(make: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make()
