"""The sums of a window of observations, and how they become one tensor and, on the host, a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rqvae.callbacks.channels.layers import Layer
from rqvae.callbacks.channels.snapshot import Latent, Snapshot
from rqvae.callbacks.channels.statistics import ACTIVATION_SUMS, LATENT_SUMS, PARAMETERS


class Readings:
    """Sums since the last `take`, on the device; counts, which the host knows, on the host.

    Args:
        layers: tracked.
        dtype: of the sums.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self._layers, self._dtype = layers, dtype
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}
        self._pairs: dict[str, Tensor] = {}
        self._latent: list[Tensor] = []
        self._samples = dict.fromkeys((layer.name for layer in self._layers), 0)
        self._steps_of = dict(self._samples)
        self._latent_samples = 0
        self._seen: set[str] = set()

    def add(self, layer: Layer, sums: Tensor, samples: int) -> None:
        """Sums over `samples` samples of one call of a layer."""
        self._sums[layer.name] = self._sums[layer.name] + sums if layer.name in self._sums else sums
        self._samples[layer.name] += samples
        self._seen.add(layer.name)

    def add_parameters(self, layer: Layer, table: Tensor) -> None:
        """A layer's weights and gradients in this step."""
        self._parameters[layer.name] = self._parameters[layer.name] + table if layer.name in self._parameters else table

    def add_pairs(self, layer: Layer, sums: Tensor) -> None:
        """Sums of products of channels over the samples that `add` counts."""
        self._pairs[layer.name] = self._pairs[layer.name] + sums if layer.name in self._pairs else sums

    def add_latent(self, per_channel: Tensor, per_place: Tensor, samples: int) -> None:
        """Sums of the posterior's moments over `samples` samples; places only where all maps have one size."""
        if not self._latent:
            self._latent = [per_channel, per_place]
        else:
            same = per_place.shape == self._latent[1].shape
            places = self._latent[1] + per_place if same else self._latent[1][:, :0]
            self._latent = [self._latent[0] + per_channel, places]
        self._latent_samples += samples

    def end_step(self) -> list[str]:
        """An observed step is done; the layers that were not seen in it."""
        unseen = [name for name in self._samples if name not in self._seen]
        for name in self._seen:
            self._steps_of[name] += 1
        self._seen.clear()
        self.steps += 1
        return unseen

    def take(self, step: int, world_size: int) -> tuple[Tensor, Callable[[Tensor], Snapshot]]:
        """All sums as one tensor, to be added up over ranks, and what makes a snapshot of the result; forgets them.

        Args:
            step: optimizer steps done.
            world_size: ranks.
        """
        names = [layer.name for layer in self._layers]
        parts = [
            group[name] for group in (self._sums, self._parameters, self._pairs) for name in names if name in group
        ]
        parts += self._latent
        counts = [*self._samples.values(), *self._steps_of.values(), self._latent_samples]
        device = parts[0].device
        parts.append(torch.tensor(counts, dtype=self._dtype).to(device))
        flat = torch.cat([part.to(device, self._dtype).flatten() for part in parts])
        shapes, steps, has_pairs = [tuple(part.shape) for part in parts], self.steps, bool(self._pairs)
        self._reset()

        def read(host: Tensor) -> Snapshot:
            pieces = host.double().split([torch.Size(shape).numel() for shape in shapes])
            shaped = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
            return _snapshot(step, steps * world_size, self._layers, shaped, has_pairs)

        return flat, read


def _snapshot(
    step: int, observations: int, layers: Sequence[Layer], parts: Sequence[Tensor], has_pairs: bool
) -> Snapshot:
    """Means of the sums; see `Readings.take` for their order. Parameters are the same on every rank."""
    count = len(layers)
    counts = parts[-1].tolist()
    samples, seen, latent_samples = counts[:count], counts[count : 2 * count], counts[-1]
    activations = torch.cat([part / max(n, 1) for part, n in zip(parts[:count], samples, strict=True)], 1)
    parameters = torch.cat(list(parts[count : 2 * count]), 1) / observations
    values = dict(zip((*ACTIVATION_SUMS, *PARAMETERS), (*activations, *parameters), strict=True))
    values["std"] = (values.pop("square") - values["mean"].square()).clamp(min=0).sqrt()
    correlations = {}
    if has_pairs:
        for layer, sums, n in zip(layers, parts[2 * count : 3 * count], samples, strict=True):
            correlations[layer.name] = _correlation(sums / max(n, 1))
    latent = None
    if latent_samples:
        per_channel, per_place = (part / latent_samples for part in parts[-3:-1])
        named = dict(zip(LATENT_SUMS, per_channel, strict=True))
        variance = (named["square"] - named["mean"].square()).clamp(min=0)
        places = (per_place[1] - per_place[0].square()).clamp(min=0)
        latent = Latent(named["kl"], variance, named["clamped"], places)
    seen_of = {layer.name: int(n) for layer, n in zip(layers, seen, strict=True)}
    return Snapshot(step, observations, tuple(layers), values, seen_of, latent, correlations)


def _correlation(sums: Tensor) -> Tensor:
    """(C, C) of the means (C + 1, C) of products and of each channel; 0 where a channel is constant."""
    products, mean = sums[:-1], sums[-1]
    covariance = products - mean[:, None] * mean
    scale = covariance.diagonal().clamp(min=0).sqrt()
    both = scale[:, None] * scale
    # what is left of a constant channel is rounding, which correlates with anything
    known = scale > 1e-5 * products.diagonal().clamp(min=0).sqrt()
    return torch.where(known[:, None] & known & (both > 0), covariance / both.clamp(min=1e-300), 0.0)
