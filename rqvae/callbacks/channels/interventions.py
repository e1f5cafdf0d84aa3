"""Acting on channels that are dead: what is done to a layer's weights, its neighbours' and the optimizer's moments.

The six strategies differ in what they reach. Multiplying gamma (the nudge of olegroshka/vae-channel-dynamics) cannot
move a gamma of 0, and no change of gamma alone wakes a channel that beta holds where the activation is flat. Recycling
is ReDo (Sokar et al. 2023, algorithm 1): new incoming weights, outgoing ones of zero, moments of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rqvae.callbacks.channels.layers import Layer
from rqvae.callbacks.channels.settings import InterventionSettings
from rqvae.callbacks.channels.wiring import Wire, outputs_first
from rqvae.errors import BadInput
from rqvae.randomness import generator


@dataclass(frozen=True)
class Touched:
    """A parameter and the axis of it along which the channels are.

    Args:
        parameter: the whole of it.
        axis: 0 or 1.
    """

    parameter: Tensor
    axis: int = 0

    def where(self, chosen_c: Tensor, new: Tensor | float) -> None:
        """Give the chosen channels' entries new values; the others keep theirs bit by bit."""
        self.set_in(self.parameter, chosen_c, new)

    def set_in(self, tensor: Tensor, chosen_c: Tensor, new: Tensor | float) -> None:
        """The same in a tensor of the parameter's shape: its gradient, a moment."""
        shape = [1] * tensor.ndim
        shape[self.axis] = -1
        tensor.copy_(torch.where(chosen_c.reshape(shape), new, tensor))


@torch.no_grad()
def act(
    layer: Layer,
    wire: Wire,
    chosen_c: Tensor,
    settings: InterventionSettings,
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> None:
    """Change the chosen channels of a norm layer, and nothing else.

    The optimizer's moments of every row that is touched, and this step's gradients of it, are zero afterwards: an old
    moment would move a new weight. Every rank does the same.

    Args:
        layer: with gamma and beta.
        wire: its neighbours.
        chosen_c: (C,) bool on the device.
        settings: the strategy and its numbers.
        optimizer: of these parameters.
        seed: of new weights.
    """
    gamma = layer.module.get_parameter("weight")
    kind = settings.strategy
    if kind == "scale_mul":
        new: Tensor | float = (gamma * settings.factor).clamp(max=settings.cap)
    elif kind == "scale_add":
        new = gamma + settings.amount
    else:
        new = 1.0
    touched = [Touched(gamma)]
    touched[0].where(chosen_c, new)
    if kind in ("affine_reset", "recycle") and isinstance(layer.module.bias, Tensor):
        touched.append(Touched(layer.module.bias))
        touched[-1].where(chosen_c, 0.0)
    if kind == "recycle":
        incoming, outgoing = neighbours(wire)
        for k, part in enumerate(incoming):
            assert wire.source is not None
            # as torch draws them at the start: U(-b, b), b = 1 / sqrt(fan_in)
            bound = 1 / math.sqrt(outputs_first(wire.source, wire.source.get_parameter("weight"))[0].numel())
            drawn = torch.rand(part.parameter.shape, generator=generator(seed, layer.name, k)) * (2 * bound) - bound
            part.where(chosen_c, drawn.to(part.parameter.device, part.parameter.dtype))
        for part in outgoing:
            part.where(chosen_c, 0.0)
        touched += [*incoming, *outgoing]
    forget(touched, chosen_c, optimizer)


def neighbours(wire: Wire) -> tuple[list[Touched], list[Touched]]:
    """The incoming weights and biases of a channel, and its outgoing weights, where they are its own."""
    incoming, outgoing = [], []
    if wire.source is not None:
        transposed = isinstance(wire.source, nn.modules.conv._ConvTransposeNd)
        for name, parameter in wire.source.named_parameters(recurse=False):
            incoming.append(Touched(parameter, int(transposed and name == "weight")))
    if wire.target is not None:
        transposed = isinstance(wire.target, nn.modules.conv._ConvTransposeNd)
        outgoing.append(Touched(wire.target.get_parameter("weight"), int(not transposed)))
    return incoming, outgoing


@torch.no_grad()
def forget(touched: Iterable[Touched], chosen_c: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set gradients and moments of the chosen channels to zero."""
    for part in touched:
        parameter = part.parameter
        moments = [x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor)]
        for tensor in [*moments, *([] if parameter.grad is None else [parameter.grad])]:
            if tensor.shape == parameter.shape:
                part.set_in(tensor, chosen_c, 0.0)


def all_of(layer: Layer, wire: Wire) -> list[Touched]:
    """Every parameter that belongs to one channel alone: gamma, beta, incoming and outgoing weights."""
    incoming, outgoing = neighbours(wire)
    return [*(Touched(p) for p in layer.module.parameters(recurse=False)), *incoming, *outgoing]


def check_trained(layers: Sequence[Layer], trained: Sequence[Tensor]) -> None:
    """That every layer has a gamma, and that it is trained.

    Raises:
        BadInput: naming the first layer that is frozen, or the lack of any layer with gamma.
    """
    known = {id(p) for p in trained}
    norms = [layer for layer in layers if layer.is_norm]
    if not norms:
        raise BadInput(
            "intervention.strategy: expected a tracked layer with gamma (GroupNorm), tracking.layers has none"
        )
    for layer in norms:
        for name, parameter in layer.module.named_parameters(recurse=False):
            if id(parameter) not in known or not parameter.requires_grad:
                raise BadInput(f"intervention.strategy: expected trained layers, {layer.name}.{name} is frozen")
