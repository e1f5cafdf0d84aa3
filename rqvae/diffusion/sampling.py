"""How samples are made: solver, steps, spacing and guidance in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rqvae.diffusion.guidance import Guidance, Velocity
from rqvae.diffusion.solvers import StepNoise, euler
from rqvae.diffusion.timesteps import sampling_times
from rqvae.errors import BadInput


@dataclass(frozen=True)
class Sampler:
    """A way to sample.

    Args:
        solver: a function of `rqvae.diffusion.solvers`, `(denoise, x, times, noise) -> (x, nfe)`.
        steps: steps from noise to data, >= 1.
        shift: > 0; above 1 spends more steps near the noise (`rqvae.diffusion.timesteps.sampling_times`).
        guidance: none, or for example `ClassifierFree`.
        start: the first time, in (0, 1]; SiT uses 0.999 for predictions that are singular at pure noise (eps on the
            linear path), and `rqvae.models.stage2.diffusion.LatentDiffusion` asks for it there.
    """

    solver: Callable = euler
    steps: int = 50
    shift: float = 1.0
    guidance: Guidance | None = None
    start: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise BadInput(f"sampler.start: expected a number in (0, 1], got {self.start}")
        sampling_times(self.steps, self.shift)

    def times(self) -> Tensor:
        """(steps + 1,) float64 on the host, from `start` to 0."""
        return sampling_times(self.steps, self.shift).clamp(max=self.start)

    def __call__(
        self, velocity: Velocity, x: Tensor, condition: Any = None, noise: StepNoise | None = None
    ) -> tuple[Tensor, int]:
        """Walk from noise to data.

        Args:
            velocity: `(x, t, condition) -> velocity`, t 0-dim float64 on the host.
            x: (B, ...) noise.
            condition: of length B, or None.
            noise: fresh noise per step, for stochastic solvers.

        Returns:
            The sample (B, ...), and how often the guided velocity was evaluated (with classifier-free guidance each
            evaluation is one forward of 2 B).
        """
        guidance = self.guidance

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return velocity(x, t, condition) if guidance is None else guidance(velocity, x, t, condition)

        return self.solver(denoise, x, self.times(), noise)
