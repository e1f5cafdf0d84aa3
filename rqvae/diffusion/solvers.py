"""Solvers of the sampling ODE dx/dt = velocity(x, t), from t = 1 (noise) to t = 0 (data).

A solver is a pure function `(denoise, x, times, noise) -> (x, nfe)`:

- denoise: `(x, t) -> velocity` with x (B, ...) and t a 0-dim float64 tensor **on the host**, so that guidance may
  decide on it (and skip a forward) without reading anything back from the device;
- times: (steps + 1,) float64 on the host, falling (`rqvae.diffusion.timesteps.sampling_times`);
- noise: fresh noise of step i for stochastic solvers, `i -> (B, ...)`; the ODE solvers take it and leave it;
- nfe: how often `denoise` was called.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
