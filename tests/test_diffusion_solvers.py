"""Solvers: order of convergence on Gaussian data, whose ODE is solved in closed form, and parity with diffusers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from rqvae.diffusion import (
    DDIM,
    VP,
    Denoiser,
    EulerMaruyama,
    LinearFlow,
    Path,
    dpm_solver_pp_2m,
    euler,
    heun,
    renoise,
    sampling_times,
)
from rqvae.errors import BadInput
from rqvae.randomness import generator

F64 = torch.float64
MEAN, STD = 0.7, 0.4
PATHS = {"flow": LinearFlow(), "cosine": VP("cosine"), "ddpm": VP("linear"), "cosine_4": VP("cosine", 4.0)}


def spread(path: Path, t: Tensor) -> Tensor:
    """Standard deviation of x_t for data N(MEAN, STD^2)."""
    return torch.hypot(path.alpha(t) * STD, path.sigma(t))


def exact(path: Path) -> Denoiser:
    """E[x0 | x_t] for data N(MEAN, STD^2)."""

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        alpha = path.alpha(t)
        return MEAN + alpha * STD**2 / spread(path, t) ** 2 * (x - alpha * MEAN)

    return Denoiser(posterior_mean, path, "x0")


def inner_times(steps: int) -> Tensor:
    """Away from both ends, where a VP path's velocity or lambda has none of its own order."""
    return torch.linspace(0.95, 0.05, steps + 1, dtype=F64)


def orders(errors: list[float]) -> list[float]:
    """Measured order of each halving of the step."""
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("solver", "order"),
    [(euler, 1), (heun, 2), (dpm_solver_pp_2m, 2), (DDIM(), 1)],
    ids=["euler", "heun", "2m", "ddim"],
)
def test_ode_solver_converges_in_its_order(solver: Any, order: int, name: str) -> None:
    path, x = PATHS[name], torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    errors = []
    # On the shifted path 2M's error changes its sign near 100 steps, so its order shows later.
    for steps in (512, 1024, 2048) if solver is dpm_solver_pp_2m else (128, 256, 512):
        times = inner_times(steps)
        alpha, std = path.alpha(times), spread(path, times)
        truth = alpha[-1] * MEAN + std[-1] / std[0] * (x - alpha[0] * MEAN)
        errors.append(float((solver(exact(path), x, times)[0] - truth).abs().max()))
    assert orders(errors) == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (dpm_solver_pp_2m, 2), (DDIM(), 1)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_holds_from_pure_noise_to_the_data(solver: Any, order: int, shift: float) -> None:
    """lambda is infinite at both ends, where its steps do not shrink: 2M's error is there h^2 log(1 / h)."""
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    errors = []
    for steps in (256, 512, 1024):
        end, _ = solver(exact(LinearFlow()), x, sampling_times(steps, shift))
        error = float((end - (MEAN + STD * x)).abs().max())
        errors.append(error / math.log(steps) if solver is dpm_solver_pp_2m else error)
    assert orders(errors) == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "solver", [DDIM(1.0), DDIM(0.5), EulerMaruyama(), EulerMaruyama(0.3)], ids=["ddpm", "ddim_0.5", "sde", "sde_0.3"]
)
def test_stochastic_solver_has_weak_order_one(solver: Any, name: str) -> None:
    """On Gaussian data a step is affine in x and in its noise, so the variance at the end is exact without sampling.

    Row 0 starts at 0, row 1 at 1, and row i + 2 sees a unit of noise in step i.
    """
    path, errors = PATHS[name], []
    for steps in (64, 128, 256):
        times = inner_times(steps)
        alpha, std = path.alpha(times), spread(path, times)
        unit = torch.eye(steps + 2, dtype=F64)[:, :, None]
        end, nfe = solver(exact(path), unit[1].clone(), times, lambda i, unit=unit: unit[i + 2])
        assert nfe == steps
        offset, gain = end[0], (end[1:] - end[0]).squeeze(1)
        variance = (gain[0] * std[0]) ** 2 + gain[1:].square().sum()
        of_mean = offset + gain[0] * alpha[0] * MEAN - alpha[-1] * MEAN
        errors.append(float(of_mean.abs() + (variance - std[-1] ** 2).abs()))
    assert orders(errors) == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("solver", "expected"),
    [(euler, 5), (heun, 9), (dpm_solver_pp_2m, 5), (DDIM(), 5), (DDIM(1.0), 5), (EulerMaruyama(), 5), (renoise, 5)],
)
def test_nfe_is_the_number_of_calls_and_time_zero_is_never_asked(solver: Any, expected: int, name: str) -> None:
    asked = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        assert x.dtype == torch.float32
        assert t.shape == ()
        assert t.dtype == F64
        assert t.device.type == "cpu"
        return torch.sin(x)

    x = torch.ones(2, 3)
    end, nfe = solver(Denoiser(predict, PATHS[name], "v"), x, sampling_times(5), lambda i: torch.ones(2, 3))
    assert nfe == len(asked) == expected
    assert asked[0] == 1
    assert min(asked) > 0
    assert end.dtype == torch.float32
    assert end.isfinite().all()


def test_one_step_of_an_x0_solver_is_the_prediction() -> None:
    x = torch.randn(3, 2, dtype=F64, generator=generator(0))
    for solver, path in itertools.product(
        (dpm_solver_pp_2m, DDIM(), DDIM(1.0), EulerMaruyama(), renoise), PATHS.values()
    ):
        end, _ = solver(Denoiser(lambda x, t: torch.sin(x), path, "x0"), x, sampling_times(1), lambda i: x)
        torch.testing.assert_close(end, torch.sin(x), rtol=1e-13, atol=1e-13)


def test_stochastic_solvers_want_noise_and_bad_settings_are_named() -> None:
    denoise, x, times = exact(LinearFlow()), torch.zeros(1, 1), sampling_times(2)
    with pytest.raises(BadInput, match="noise: expected a function of the step for DDIM of eta 0.5, got None"):
        DDIM(0.5)(denoise, x, times)
    with pytest.raises(BadInput, match="noise: expected a function of the step for EulerMaruyama, got None"):
        EulerMaruyama()(denoise, x, times)
    with pytest.raises(BadInput, match="noise: expected a function of the step for renoise, got None"):
        renoise(denoise, x, times)
    with pytest.raises(BadInput, match=r"solver.eta: expected a number in \[0, 1\], got 2"):
        DDIM(2.0)
    with pytest.raises(BadInput, match="solver.diffusion: expected a number >= 0, got -1"):
        EulerMaruyama(-1.0)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any nonlinear answer of order one."""
    return torch.sin(3 * x) + t.to(x)


def start() -> Tensor:
    return torch.randn(4, 3, dtype=F64, generator=generator(1))


def fresh(i: int) -> Tensor:
    return torch.randn(4, 3, dtype=F64, generator=generator("step", i))


def test_euler_and_heun_are_those_of_diffusers() -> None:
    one = FlowMatchEulerDiscreteScheduler(shift=2.0)
    one.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist())
    two = FlowMatchHeunDiscreteScheduler(shift=2.0)
    two.set_timesteps(6)
    for solver, scheduler in ((euler, one), (heun, two)):
        theirs = start()
        for t in scheduler.timesteps:
            theirs = scheduler.step(network(theirs, t / 1000), t, theirs).prev_sample
        times = scheduler.sigmas.double().unique().flip(0)
        ours, nfe = solver(network, start(), times)
        assert nfe == len(scheduler.timesteps)
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def test_renoise_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchLCMScheduler
    from diffusers.schedulers import scheduling_flow_match_lcm

    scheduler = FlowMatchLCMScheduler(shift=2.0)
    scheduler.set_timesteps(5)
    numbers = itertools.count()
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *_, **__: fresh(next(numbers)))
    theirs = start()
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t / 1000), t, theirs).prev_sample
    ours, nfe = renoise(Denoiser(network, LinearFlow()), start(), scheduler.sigmas.double(), fresh)
    assert nfe == 5
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


MULTISTEP = [("flow_prediction", "velocity"), ("v_prediction", "v"), ("sample", "x0"), ("epsilon", "eps")]


@pytest.mark.parametrize(("theirs_predicts", "prediction"), MULTISTEP)
@pytest.mark.parametrize("stochastic", [False, True], ids=["2m", "sde_first_order"])
def test_dpm_solver_is_that_of_diffusers(theirs_predicts: Any, prediction: Any, stochastic: bool) -> None:
    """2M against ours; their first-order SDE solver is DDIM with eta = 1, on the flow path too."""
    flow = prediction == "velocity"
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=theirs_predicts,
        use_flow_sigmas=flow,
        flow_shift=3.0 if flow else 1.0,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        solver_order=1 if stochastic else 2,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(20)
    path = LinearFlow() if flow else VP("linear")
    times = scheduler.sigmas.double() if flow else sampling_times(20)
    # Their table of VP sigmas is a cumulative product in fp32; the formulas are compared on the exact one.
    scheduler.sigmas = times if flow else path.sigma(times) / path.alpha(times)
    theirs = start()
    for i, t in enumerate(scheduler.timesteps):
        answer = network(theirs, times[i])
        theirs = scheduler.step(answer, t, theirs, variance_noise=fresh(i) if stochastic else None).prev_sample
    solver = DDIM(1.0) if stochastic else dpm_solver_pp_2m
    ours, nfe = solver(Denoiser(network, path, prediction), start(), times, fresh)
    assert nfe == 20
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("theirs_predicts", "prediction"), MULTISTEP[1:])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers(theirs_predicts: Any, prediction: Any, eta: float) -> None:
    scheduler = DDIMScheduler(prediction_type=theirs_predicts, clip_sample=False, timestep_spacing="trailing")
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)
    scheduler.set_timesteps(20)
    theirs = start()
    for i, t in enumerate(scheduler.timesteps):
        answer = network(theirs, (t + 1).double() / 1000)
        noise = fresh(i) if eta > 0 else None
        theirs = scheduler.step(answer, int(t), theirs, eta=eta, variance_noise=noise).prev_sample
    ours, _ = DDIM(eta)(Denoiser(network, VP("linear"), prediction), start(), sampling_times(20), fresh)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
