"""Every solver, prediction and path samples a mixture in the plane, given the exact posterior mean in float64."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rqvae.diffusion import (
    DDIM,
    VP,
    Denoiser,
    EulerMaruyama,
    LinearFlow,
    Path,
    Sampler,
    dpm_solver_pp_2m,
    euler,
    heun,
)
from rqvae.randomness import generator

F64 = torch.float64
WEIGHTS = torch.tensor([0.3, 0.7], dtype=F64)
MEANS = torch.tensor([[-2.0, 1.0], [1.5, -0.5]], dtype=F64)
STDS = torch.tensor([0.3, 0.6], dtype=F64)
SOLVERS = {
    "euler": euler,
    "heun": heun,
    "2m": dpm_solver_pp_2m,
    "ddim": DDIM(),
    "ddim_0.5": DDIM(0.5),
    "ddpm": DDIM(1.0),
    "sde": EulerMaruyama(),
}
PATHS = {"flow": LinearFlow(), "cosine": VP("cosine"), "ddpm": VP("linear"), "cosine_2": VP("cosine", 2.0)}
POINTS = 2048


def posterior_mean(path: Path, x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t = x] under the mixture."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance_k = (alpha * STDS) ** 2 + sigma**2
    away_bkd = x[:, None] - alpha * MEANS
    log_weight_bk = WEIGHTS.log() - variance_k.log() - away_bkd.square().sum(2) / (2 * variance_k)
    data_bkd = MEANS + (alpha * STDS**2 / variance_k)[:, None] * away_bkd
    return (log_weight_bk.softmax(1)[..., None] * data_bkd).sum(1)


@cache
def initial_noise() -> Tensor:
    """A scrambled Sobol set: its moments are right to about 1e-3, where random points give 2e-2."""
    points = torch.quasirandom.SobolEngine(2, True, seed=0).draw(POINTS, dtype=F64)
    return torch.distributions.Normal(0, 1).icdf(points)


def fresh(i: int) -> Tensor:
    """The Sobol set in another order for each step: right moments here too."""
    return initial_noise()[torch.randperm(POINTS, generator=generator("step", i))]


@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps", "v"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_mixture_has_its_moments(solver: str, path: str, prediction: Any) -> None:
    calls = []

    def predict(x: Tensor, t: Tensor, _: None) -> Tensor:
        calls.append(len(x))
        (answer,) = Denoiser(partial(posterior_mean, PATHS[path]), PATHS[path], "x0").at(x, t, prediction)
        return answer

    sampler = Sampler(SOLVERS[solver], steps=120, start=0.999)  # type: ignore[arg-type]
    x, nfe = sampler(predict, initial_noise(), None, fresh, path=PATHS[path], prediction=prediction)
    mean = WEIGHTS @ MEANS
    covariance = torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS - mean, MEANS - mean) + WEIGHTS @ STDS**2 * torch.eye(2)
    assert nfe == len(calls) == (239 if solver == "heun" else 120)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.12)
    left = x[:, 0] < -0.8
    assert float(left.double().mean()) == pytest.approx(0.3, abs=0.02)
    for side, k in ((left, 0), (~left, 1)):
        torch.testing.assert_close(x[side].std(0), STDS[k].expand(2), rtol=0.12, atol=0)
