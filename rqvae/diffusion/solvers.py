"""Solvers from t = 1 (noise) to t = 0 (data): of the ODE dx/dt = velocity(x, t), and of SDEs with its marginals.

A solver is a pure function `(denoise, x, times, noise) -> (x, nfe)`; one with settings is a frozen dataclass that is
called like a function.

- denoise: a `Denoiser`; called as `(x, t) -> velocity`, or `denoise.at(x, t, "x0", ...)` for other quantities of one
  evaluation. x is (B, ...), t a 0-dim float64 tensor **on the host**, so that guidance may decide on it (and skip
  a forward) without reading anything back from the device. `euler` and `heun` take any function of (x, t);
- times: (steps + 1,) float64 on the host, falling (`rqvae.diffusion.timesteps.sampling_times`);
- noise: fresh standard normal noise of step i for stochastic solvers, `i -> (B, ...)` (`rqvae.diffusion.noise`);
  the others take it and leave it;
- nfe: how often the network was asked.

Coefficients are made on the host in float64 and go to the device in one copy before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.diffusion.denoiser import Denoiser
from rqvae.diffusion.paths import Path
from rqvae.errors import BadInput

Denoise = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]


def euler(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    noise: StepNoise | None = None,  # noqa: ARG001  (the signature of every solver)
) -> tuple[Tensor, int]:
    """First order, one evaluation a step; never evaluates at the last time. See the module for the arguments."""
    dts = times.diff().to(x)
    for i, dt in enumerate(dts):
        x = x + dt * denoise(x, times[i])
    return x, len(dts)


def heun(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    noise: StepNoise | None = None,  # noqa: ARG001  (the signature of every solver)
) -> tuple[Tensor, int]:
    """Second order: the trapezoidal rule on an Euler guess (Karras et al. 2022, EDM, algorithm 1).

    The last step is plain Euler, as there: at t = 0 the velocity of an x0 prediction is 0/0. One first-order step of
    length h costs O(h^2), so the order stays two. 2 steps - 1 evaluations.
    """
    dts = times.diff().to(x)
    for i, dt in enumerate(dts[:-1]):
        here = denoise(x, times[i])
        there = denoise(x + dt * here, times[i + 1])
        x = x + dt * 0.5 * (here + there)
    return x + dts[-1] * denoise(x, times[-2]), 2 * len(dts) - 1


def dpm_solver_pp_2m(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    noise: StepNoise | None = None,  # noqa: ARG001  (the signature of every solver)
) -> tuple[Tensor, int]:
    """Second order with one evaluation a step: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), on any path.

    A step from s to t is x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - exp(-h)) D with h the growth of
    lambda = log(alpha / sigma), and D the predicted x0 extrapolated along lambda by half a step from the one before.
    First order where lambda has no finite difference: the first step, and the last one where it ends at sigma = 0.
    There the steps of lambda do not shrink with the steps h of t: from noise to data the error is h^2 log(1 / h)
    (tests/test_diffusion_solvers.py).
    """
    weights = _multistep_weights(denoise.path, times).to(x)
    before = torch.zeros_like(x)
    for i, (of_x, of_data, extrapolation) in enumerate(weights):
        (data,) = denoise.at(x, times[i], "x0")
        x = of_x * x + of_data * (data + extrapolation * (data - before))
        before = data
    return x, len(weights)


def renoise(denoise: Denoiser, x: Tensor, times: Tensor, noise: StepNoise | None = None) -> tuple[Tensor, int]:
    """Predict x0, add fresh noise of the next level, and so on (Song et al. 2023, "Consistency Models", algorithm 1).

    For few steps: nothing of x is kept, so an error of one step is forgotten in the next. With many steps its marginals
    are too narrow unless the network is a consistency model. A step to sigma = 0 is the prediction. One evaluation
    a step.

    Raises:
        BadInput: a step to sigma > 0 and no noise.
    """
    alpha, sigma = denoise.path.alpha(times[1:]), denoise.path.sigma(times[1:])
    fresh_noise = _given(noise, "renoise") if bool((sigma > 0).any()) else None
    weights = torch.stack((alpha, sigma), 1).to(x)
    for i, (of_data, of_noise) in enumerate(weights):
        (x,) = denoise.at(x, times[i], "x0")
        if fresh_noise is not None and sigma[i] > 0:
            x = of_data * x + of_noise * fresh_noise(i)
    return x, len(weights)


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song, Meng, Ermon 2020, eq. 12 and 16), on any path.

    x_t = alpha_t x0 + sqrt(sigma_t^2 - s^2) eps + s z with s = eta sigma_t sqrt(1 - r^2),
    r = (sigma_t / alpha_t) / (sigma_s / alpha_s). First order, one evaluation a step.

    Args:
        eta: in [0, 1]; 0 is the ODE, 1 the ancestral sampler of DDPM (on a VP path, eq. 16 of the paper).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise BadInput(f"solver.eta: expected a number in [0, 1], got {self.eta}")

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, noise: StepNoise | None = None
    ) -> tuple[Tensor, int]:
        """See the module.

        Raises:
            BadInput: eta > 0 without noise.
        """
        fresh_noise = _given(noise, f"DDIM of eta {self.eta:g}") if self.eta > 0 else None
        alpha, sigma = denoise.path.alpha(times), denoise.path.sigma(times)
        fresh = self.eta * sigma[1:] * (1 - _remaining(alpha, sigma).square()).clamp(min=0).sqrt()
        kept = (sigma[1:].square() - fresh.square()).clamp(min=0).sqrt()
        weights = torch.stack((alpha[1:], kept, fresh), 1).to(x)
        for i, (of_data, of_eps, of_noise) in enumerate(weights):
            data, eps = denoise.at(x, times[i], "x0", "eps")
            x = of_data * data + of_eps * eps
            if fresh_noise is not None:
                x = x + of_noise * fresh_noise(i)
        return x, len(weights)


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama of the reverse SDE dx = (velocity + w eps / (2 sigma)) dt + sqrt(w) dW, w = diffusion sigma(t).

    Its marginals are the ODE's for every w >= 0, as eps = -sigma score (Song et al. 2021; Ma et al. 2024, SiT,
    section 2, whose default w is sigma too: the drift then has no 1 / sigma). The last step goes to the predicted x0
    without noise where it ends at sigma = 0, as Tweedie's last step in SiT. Weak order one, one evaluation a step.

    Args:
        diffusion: >= 0; 0 is the ODE, larger forgets errors of early steps and needs more steps.
    """

    diffusion: float = 1.0

    def __post_init__(self) -> None:
        if not self.diffusion >= 0:
            raise BadInput(f"solver.diffusion: expected a number >= 0, got {self.diffusion}")

    def __call__(
        self, denoise: Denoiser, x: Tensor, times: Tensor, noise: StepNoise | None = None
    ) -> tuple[Tensor, int]:
        """See the module.

        Raises:
            BadInput: no noise.
        """
        fresh_noise = _given(noise, "EulerMaruyama")
        dts, sigma = times.diff(), denoise.path.sigma(times)
        spread = (self.diffusion * sigma[:-1] * -dts).sqrt()
        weights = torch.stack((dts, dts * self.diffusion / 2, spread), 1).to(x)
        walked = len(dts) - int(sigma[-1] == 0)
        for i in range(walked):
            dt, of_eps, of_noise = weights[i]
            velocity, eps = denoise.at(x, times[i], "velocity", "eps")
            x = x + dt * velocity + of_eps * eps + of_noise * fresh_noise(i)
        if walked < len(dts):
            (x,) = denoise.at(x, times[walked], "x0")
        return x, len(dts)


def _remaining(alpha: Tensor, sigma: Tensor) -> Tensor:
    """exp(-h) of each step: the ratio of sigma / alpha after and before, finite at alpha = 0 and at sigma = 0."""
    return sigma[1:] * alpha[:-1] / (alpha[1:] * sigma[:-1])


def _multistep_weights(path: Path, times: Tensor) -> Tensor:
    """(steps, 3) float64: weights of x, of the data, and of the data's last change."""
    alpha, sigma = path.alpha(times), path.sigma(times)
    h = (alpha.log() - sigma.log()).diff()
    extrapolation = torch.zeros_like(h)
    extrapolation[1:] = h[1:] / (2 * h[:-1])
    # An infinite h is a step from alpha = 0, whose successor then has weight 0, or one to sigma = 0: no difference.
    extrapolation = torch.where(h.isfinite(), extrapolation, torch.zeros_like(h))
    return torch.stack((sigma[1:] / sigma[:-1], alpha[1:] * (1 - _remaining(alpha, sigma)), extrapolation), 1)


def _given(noise: StepNoise | None, solver: str) -> StepNoise:
    """The noise, which must be there."""
    if noise is None:
        raise BadInput(f"noise: expected a function of the step for {solver}, got None")
    return noise
