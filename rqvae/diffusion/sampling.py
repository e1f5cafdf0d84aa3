"""How samples are made: solver, steps, spacing and guidance in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rqvae.contracts import check_function, check_shape, describe
from rqvae.diffusion.denoiser import Denoiser
from rqvae.diffusion.guidance import Guidance, Predict
from rqvae.diffusion.paths import LinearFlow, Path, Prediction
from rqvae.diffusion.solvers import StepNoise, euler
from rqvae.diffusion.timesteps import sampling_times
from rqvae.errors import BadInput


@dataclass(frozen=True)
class Sampler:
    """A way to sample.

    Args:
        solver: by its import path: a function of `rqvae.diffusion` (`rqvae.diffusion.euler`, `heun`,
            `dpm_solver_pp_2m`, `renoise`), a class with settings (`DDIM`, `EulerMaruyama`), or your own: `(denoise, x,
            times, noise) -> (x, nfe)`.
        steps: steps from noise to data, >= 1.
        shift: > 0; above 1 spends more steps near the noise (`rqvae.diffusion.timesteps.sampling_times`).
        guidance: none, or for example `ClassifierFree`, `Interval`, `Autoguidance`.
        start: the first time, in (0, 1]; SiT uses 0.999 for predictions that are singular at pure noise (eps on the
            linear path), and `rqvae.models.stage2.diffusion.LatentDiffusion` asks for it there.
    """

    solver: Callable = euler
    steps: int = 50
    shift: float = 1.0
    guidance: Guidance | None = None
    start: float = 1.0

    def __post_init__(self) -> None:
        check_function(self.solver, "sampler.solver", "denoise", "x", "times", "noise")
        self.times()

    def times(self) -> Tensor:
        """(steps + 1,) float64 on the host, from `start` to 0."""
        return sampling_times(self.steps, self.shift, self.start)

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        condition: Any = None,
        noise: StepNoise | None = None,
        *,
        path: Path | None = None,
        prediction: Prediction = "velocity",
    ) -> tuple[Tensor, int]:
        """Walk from noise to data.

        Args:
            predict: `(x, t, condition) -> prediction`, t 0-dim float64 on the host.
            x: (B, ...) noise.
            condition: of length B, or None.
            noise: fresh noise per step, for stochastic solvers.
            path: the path of the predictions; None is `LinearFlow`.
            prediction: what `predict` answers.

        Returns:
            The sample (B, ...), and how often the guided prediction was evaluated (with classifier-free guidance
            each evaluation is one forward of 2 B, with autoguidance one of B in each network).
        """
        guidance = self.guidance

        def guided(x: Tensor, t: Tensor) -> Tensor:
            return predict(x, t, condition) if guidance is None else guidance(predict, x, t, condition)

        answer = self.solver(Denoiser(guided, path or LinearFlow(), prediction), x, self.times(), noise)
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], int):
            raise BadInput(f"sampler.solver: expected the answer (x, nfe), nfe an int, got {describe(answer)}")
        check_shape(answer[0], tuple(x.shape), "sampler.solver: x")
        return answer
