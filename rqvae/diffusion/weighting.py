"""Which times of the path count more in the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rqvae.diffusion.paths import Path
from rqvae.errors import BadInput


class Weighting(ABC):
    """A weight of each sample's squared error, of its time alone."""

    @abstractmethod
    def __call__(self, path: Path, t_b: Tensor) -> Tensor:
        """Weights (B,) at the times `t_b` (B,) of a path."""


@dataclass(frozen=True)
class P2(Weighting):
    """(k + SNR)^-gamma, SNR = alpha^2 / sigma^2 (Choi et al. 2022, "Perception Prioritized Training", eq. 8).

    There it stands before the error of eps; it is applied here, as in the code that came after it
    (lucidrains/denoising-diffusion-pytorch), to the error of whatever is predicted.

    Args:
        gamma: >= 0; 0 is no weighting, 1 the paper's.
        k: > 0.

    Raises:
        BadInput: a number out of its range.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.k <= 0:
            raise BadInput(f"weighting: expected gamma >= 0 and k > 0, got {self.gamma} and {self.k}")

    def __call__(self, path: Path, t_b: Tensor) -> Tensor:
        """See `Weighting`."""
        return (self.k + (path.alpha(t_b) / path.sigma(t_b)).square()) ** -self.gamma
