"""What a solver asks: the network's answer at (x, t), as the quantity that the solver works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rqvae.diffusion.paths import Path, Prediction


@dataclass(frozen=True)
class Denoiser:
    """A (guided) prediction with the path it was made on, so that one evaluation gives whatever a solver needs.

    Called like a function it is the velocity, which is all that `euler` and `heun` ask.

    Args:
        predict: `(x (B, ...), t) -> (B, ...)`, t a 0-dim float64 tensor on the host.
        path: where x lies between data and noise.
        prediction: what `predict` answers.
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    path: Path
    prediction: Prediction = "velocity"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity (B, ...) at x (B, ...) and t (0-dim, host); one evaluation."""
        return self.at(x, t, "velocity")[0]

    def at(self, x: Tensor, t: Tensor, *wanted: Prediction) -> list[Tensor]:
        """The quantities that are `wanted`, each (B, ...), of one evaluation at x (B, ...) and t (0-dim, host)."""
        value = self.predict(x, t)
        return [self._converted(value, x, t, kind) for kind in wanted]

    def _converted(self, value: Tensor, x: Tensor, t: Tensor, kind: Prediction) -> Tensor:
        if kind == self.prediction:
            return value
        # In float64 on the host: near the data of a VP path both weights are differences of almost equal numbers.
        of_x, of_value = self.path.conversion(t, self.prediction, kind)
        return of_x.to(x) * x + of_value.to(x) * value
