"""What is known of all channels at one moment, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rqvae.callbacks.channels.layers import Layer


@dataclass(frozen=True)
class Latent:
    """A posterior's channels, (C,) each.

    Args:
        kl: KL divergence to N(0, 1) in nats a dimension, mean over samples and places.
        variance: of the posterior's mean over samples and places; a unit is active above 0.01 (Burda et al. 2015).
        clamped: share of log-variances at the bounds [-30, 20].
        place_variance: (C h w,) the same over samples alone, at each place; empty where maps had several sizes.
    """

    kl: Tensor
    variance: Tensor
    clamped: Tensor
    place_variance: Tensor


@dataclass(frozen=True)
class Snapshot:
    """Statistics of one window.

    Args:
        step: optimizer steps done at its end.
        observations: probed steps times ranks.
        layers: whose channels stand one after the other in each of `values`.
        values: (total channels,) float64, by name: mean std abs peak near_zero sensitivity weight_norm grad_norm gamma
            beta in_norm out_norm; NaN where a layer has none.
        counts: of each layer, in how many of the observations it was seen.
        latent: of the posterior; None where the model has none that is known.
        correlations: (C, C) of each layer, where pairs are tracked.
    """

    step: int
    observations: int
    layers: tuple[Layer, ...]
    values: Mapping[str, Tensor]
    counts: Mapping[str, int]
    latent: Latent | None = None
    correlations: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, layer: str) -> dict[str, Tensor]:
        """(C,) of each statistic of one layer.

        Raises:
            KeyError: a layer that is not tracked.
        """
        for known in self.layers:
            if known.name == layer:
                return {name: value[known.start : known.stop] for name, value in self.values.items()}
        raise KeyError(layer)
