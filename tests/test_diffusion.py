"""Paths, laws of times, solvers and guidance against closed forms, scipy and diffusers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats
from torch import Tensor

from rqvae.diffusion import (
    ClassifierFree,
    LinearFlow,
    LogitNormal,
    Path,
    Sampler,
    Shifted,
    TimestepLaw,
    Uniform,
    euler,
    heun,
    sampling_times,
)
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition
from rqvae.randomness import generator

F64 = torch.float64
PREDICTIONS = ("velocity", "x0", "eps")


class Cosine(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): a path with unlike derivatives, to try the table on."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)


def triple(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(seed)
    noise, x0 = torch.randn(2, 6, 3, 4, 5, dtype=F64, generator=rng)
    return noise, x0, torch.linspace(0.05, 0.95, 6, dtype=F64)


def test_linear_flow_is_the_straight_line() -> None:
    noise, x0, t_b = triple()
    for i in range(len(t_b)):
        expected = x0[i] + t_b[i] * (noise[i] - x0[i])
        torch.testing.assert_close(LinearFlow().interpolate(noise, x0, t_b)[i], expected, rtol=0, atol=1e-14)
    assert torch.equal(LinearFlow().target("velocity", noise, x0, t_b), noise - x0)
    assert torch.equal(LinearFlow().interpolate(noise, x0, torch.zeros(6, dtype=F64)), x0)
    assert torch.equal(LinearFlow().interpolate(noise, x0, torch.ones(6, dtype=F64)), noise)


@pytest.mark.parametrize("path", [LinearFlow(), Cosine()], ids=lambda p: type(p).__name__)
def test_velocity_is_the_derivative_of_the_path(path: Path) -> None:
    noise, x0, t_b = triple()
    _, derivative = torch.func.jvp(lambda t: path.interpolate(noise, x0, t), (t_b,), (torch.ones_like(t_b),))
    torch.testing.assert_close(path.target("velocity", noise, x0, t_b), derivative, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("path", [LinearFlow(), Cosine()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_conversion_gives_the_true_quantity(path: Path, source: Any, target: Any) -> None:
    noise, x0, t_b = triple()
    x_t = path.interpolate(noise, x0, t_b)
    true = {"x0": x0, "eps": noise, "velocity": path.target("velocity", noise, x0, t_b)}
    got = path.convert(true[source], x_t, t_b, source, target)
    torch.testing.assert_close(got, true[target], rtol=1e-11, atol=1e-11)


def test_determinant_is_zero_where_a_prediction_says_nothing() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert (LinearFlow().determinant("eps", ends) == 0).tolist() == [False, True]
    assert (LinearFlow().determinant("x0", ends) == 0).tolist() == [True, False]
    assert (LinearFlow().determinant("velocity", ends) == 0).tolist() == [False, False]
    with pytest.raises(BadInput, match=r"prediction: expected one of .*x0.*, got noise"):
        LinearFlow().target("noise", ends, ends, ends)


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


def gaussian_velocity(mean: float, std: float) -> Any:
    """E[noise - x0 | x_t] for x0 ~ N(mean, std^2) on the linear path; the exact end from x is mean + std x."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    return velocity


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_solver_converges_in_its_order(solver: Any, order: int, shift: float) -> None:
    mean, std = 0.7, 0.4
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    errors = [
        (solver(gaussian_velocity(mean, std), x, sampling_times(steps, shift))[0] - (mean + std * x)).abs().max()
        for steps in (64, 128, 256)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "expected"), [(euler, 5), (heun, 9)])
def test_nfe_is_the_number_of_calls_and_time_zero_is_never_asked(solver: Any, expected: int) -> None:
    asked = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        assert t.shape == ()
        assert t.dtype == F64
        assert t.device.type == "cpu"
        return torch.zeros_like(x)

    _, nfe = solver(denoise, torch.zeros(2, 1), sampling_times(5))
    assert nfe == len(asked) == expected
    assert asked[0] == 1
    assert min(asked) > 0


def test_euler_is_the_step_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist())
    x = torch.randn(4, 3, generator=generator(1))
    theirs = x
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(torch.sin(3 * theirs) + scheduler.sigmas[i], t, theirs).prev_sample
    ours, _ = euler(lambda x, t: torch.sin(3 * x) + t.float(), x, sampling_times(6, 2.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_exact_velocity_of_a_mixture_gives_its_moments() -> None:
    """Two Gaussians in the plane: sampling with E[noise - x0 | x_t] must return their weights, means and covariance."""
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    means = torch.tensor([[-2.0, 1.0], [1.5, -0.5]], dtype=F64)
    stds = torch.tensor([0.3, 0.6], dtype=F64)

    def velocity(x: Tensor, t: Tensor, _: Any) -> Tensor:
        variance_k = (1 - t) ** 2 * stds**2 + t**2
        away_bkd = x[:, None] - (1 - t) * means
        log_weight_bk = weights.log() - variance_k.log() - away_bkd.square().sum(2) / (2 * variance_k)
        v_bkd = -means + ((t - (1 - t) * stds**2) / variance_k)[:, None] * away_bkd
        return (log_weight_bk.softmax(1)[..., None] * v_bkd).sum(1)

    # A scrambled Sobol set in place of random noise: 4,096 points have moments to about 1e-3.
    noise = torch.distributions.Normal(0, 1).icdf(torch.quasirandom.SobolEngine(2, True, seed=0).draw(4096, dtype=F64))
    x, _ = Sampler(heun, steps=200)(velocity, noise)
    mean = weights @ means
    covariance = torch.einsum("k,ki,kj->ij", weights, means - mean, means - mean) + (weights @ stds**2) * torch.eye(2)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.04)
    assert (x[:, 0] < -0.8).double().mean().item() == pytest.approx(0.3, abs=0.01)


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


def test_guidance_without_a_condition_is_refused() -> None:
    with pytest.raises(BadInput, match="condition: expected one for guidance of scale 2, got None"):
        ClassifierFree(2.0)(labelled_velocity, torch.zeros(1, 1, 1, 1), torch.tensor(0.5), None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampler(steps=0), "sampler.steps: expected a whole number >= 1, got 0"),
        (lambda: Sampler(shift=0.0), "sampler.shift: expected a number > 0, got 0"),
        (lambda: Sampler(start=0.0), r"sampler.start: expected a number in \(0, 1\], got 0"),
        (lambda: LogitNormal(std=0.0), "timesteps.std: expected a number > 0, got 0"),
        (lambda: Shifted(-1.0), "timesteps.shift: expected a number > 0, got -1"),
    ],
)
def test_bad_settings_are_named(make: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make()
