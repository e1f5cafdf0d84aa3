"""What stands before and behind each tracked layer: found by watching one forward pass, not by reading names.

A tensor that a convolution, a linear layer or a tracked layer gave is followed through operations that keep channels
apart until a layer takes it in. So an activation that is a function (`F.silu`) and one that is a module are found
alike, and a layer whose output is added to something, as a residual is, has no neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rqvae.callbacks.channels.layers import Layer, channels_of, is_leaf

ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
}
_CARRIERS = {"dropout", "dropout2d", "feature_dropout", "contiguous", "to", "float", "type", "clone", "identity"}
_CARRIERS |= {"flatten", "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "interpolate", "pad"}
_CARRIERS |= {"upsample_nearest2d", "alpha_dropout"}
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Wire:
    """The neighbours of a layer.

    Args:
        activation_name: of the elementwise function that follows; "" for none.
        activation: itself, with the arguments of its call.
        source: the convolution or linear layer whose output channel c becomes this norm's channel c; None where
            there is no such one, as behind a sum.
        target: the convolution or linear layer that takes channel c in as its input c.
    """

    activation_name: str = ""
    activation: Callable[[Tensor], Tensor] | None = None
    source: nn.Module | None = None
    target: nn.Module | None = None


def outputs_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight with its output channels along the first axis."""
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) and weight.ndim > 1
    return weight.transpose(0, 1) if transposed else weight


def inputs_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight with its input channels along the first axis."""
    return weight if isinstance(module, nn.modules.conv._ConvTransposeNd) else weight.transpose(0, 1)


@dataclass
class _Followed:
    """A tensor on its way: it is kept, since the identity of one that is gone may be given to another."""

    tensor: Tensor
    source: nn.Module
    layer: Layer | None
    raw: Tensor | None
    activation_name: str = ""
    activation: Callable[[Tensor], Tensor] | None = None
    user: str = ""


@dataclass
class Discovery:
    """Finds the wires of layers during a forward pass of the model, and hands each layer's output over once.

    Args:
        model: it is watched from `begin` to `end`.
        layers: tracked.
        observe: called with a layer, its output, and its wire without `target`, before anything can change the output
            in place.
    """

    model: nn.Module
    layers: Sequence[Layer]
    observe: Callable[[Layer, Tensor, Wire], None]
    wires: dict[str, Wire] = field(default_factory=dict)
    _followed: dict[int, _Followed] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _mode: _Watch | None = None
    _depth: int = 0
    _inside: int = 0

    def begin(self) -> None:
        """Watch every call of a module from here on."""
        for module in self.model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def end(self) -> dict[str, Wire]:
        """Stop watching; the wires by layer name."""
        for handle in self._handles:
            handle.remove()
        for followed in list(self._followed.values()):
            self._hand_over(followed)
        self._followed.clear()
        return {layer.name: self.wires.get(layer.name, Wire()) for layer in self.layers}

    def give(self, layer: Layer, output: Tensor) -> None:
        """A tracked layer's output, from the tracker's own hook."""
        with torch._C.DisableTorchFunction():  # its own operations are none of the model's
            self._followed[id(output)] = _Followed(output, layer.module, layer, output.detach())

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if in_backward():
            return
        self._depth += 1
        if self._depth == 1:
            self._mode = _Watch(self)
            self._mode.__enter__()
        if is_leaf(module) and channels_of(module) is not None:
            self._inside += 1
            if arguments and isinstance(arguments[0], Tensor):
                self._taken(module, arguments[0])

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if in_backward():
            return
        self._depth -= 1
        self._inside -= is_leaf(module) and channels_of(module) is not None
        if self._depth == 0 and self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
        if isinstance(module, _WEIGHTED) and isinstance(output, Tensor) and id(output) not in self._followed:
            self._followed[id(output)] = _Followed(output, module, None, None)

    def _taken(self, module: nn.Module, taken: Tensor) -> None:
        """A layer takes in a tensor that may have been followed."""
        followed = self._followed.get(id(taken))
        if followed is None or self._is_shared(followed):
            return
        self._hand_over(followed)
        layer = followed.layer
        if isinstance(module, _WEIGHTED):
            del self._followed[id(taken)]
            count = getattr(module, "in_channels", getattr(module, "in_features", None))
            if layer is not None and count == layer.channels and getattr(module, "groups", 1) == 1:
                self._add(layer, target=module)
            return
        known = next((known for known in self.layers if known.module is module), None)
        if known is not None and isinstance(followed.source, _WEIGHTED) and followed.activation is None:
            self._add(known, source=followed.source)
            followed.user = known.name  # it is followed further, in case that something else takes it in too

    def _is_shared(self, followed: _Followed) -> bool:
        """Whether a norm took it in before: then it feeds that norm and something else, and is no one's source."""
        if not followed.user:
            return False
        self.wires[followed.user] = replace(self.wires[followed.user], source=None)
        self._followed.pop(id(followed.tensor), None)
        return True

    def _add(self, layer: Layer, **found: Any) -> None:
        """Note a neighbour; of a layer that is called several times the first one counts."""
        wire = self.wires.get(layer.name, Wire())
        known = {name: value for name, value in vars(wire).items() if value not in (None, "")}
        self.wires[layer.name] = Wire(**{**found, **known})

    def _hand_over(self, followed: _Followed) -> None:
        if followed.layer is None or followed.raw is None:
            return
        self._add(followed.layer, activation_name=followed.activation_name, activation=followed.activation)
        raw, followed.raw = followed.raw, None
        with torch._C.DisableTorchFunction():
            self.observe(followed.layer, raw, self.wires[followed.layer.name])

    def watch(self, call: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Do one of the model's operations, and follow the tensors that it takes."""
        name, inputs = getattr(call, "__name__", ""), [*arguments, *keywords.values()]
        if self._inside or name == "detach":  # a layer's own work; what someone else's hook does
            return call(*arguments, **keywords)
        hits = [followed for x in _tensors(inputs) if (followed := self._followed.get(id(x))) is not None]
        hits = [followed for followed in hits if not self._is_shared(followed)]
        plain = name.rstrip("_")
        is_activation = bool(hits) and plain in ACTIVATIONS and hits[0].activation is None
        if is_activation:
            hits[0].activation_name, hits[0].activation = plain, _with_arguments(plain, arguments, keywords)
        if is_activation or name.endswith("_"):  # before it changes its input in place
            for followed in hits:
                self._hand_over(followed)
        result = call(*arguments, **keywords)
        if hits and isinstance(result, Tensor):
            self._go_on(hits, result, carried=is_activation or plain in _CARRIERS)
        return result

    def _go_on(self, hits: Sequence[_Followed], result: Tensor, carried: bool) -> None:
        """The result is followed in place of its first input where channels stay apart.

        A layer's output is waited for until an activation or a layer takes it in: others may look at it before.
        """
        for followed in hits:
            if followed.layer is None:
                self._followed.pop(id(followed.tensor), None)
        if carried:
            self._followed.pop(id(hits[0].tensor), None)
            hits[0].tensor = result
            self._followed[id(result)] = hits[0]


def _with_arguments(name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """An activation with the arguments of its call, but for the one that makes it work in place."""
    kept = {key: value for key, value in keywords.items() if key not in ("inplace", "input")}
    only_in_place = name in ("relu", "silu", "mish", "hardswish")
    call, more = ACTIVATIONS[name], () if only_in_place else tuple(arguments[1:])
    return lambda a: call(a, *more, **kept)


def in_backward() -> bool:
    """Whether this is a backward pass, in which activation checkpointing calls modules again (torch uses the same)."""
    return torch._C._current_graph_task_id() != -1


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


class _Watch(TorchFunctionMode):
    """Tells a discovery of every operation."""

    def __init__(self, discovery: Discovery) -> None:
        super().__init__()
        self._discovery = discovery

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").startswith("__"):  # properties, as `x.shape` is
            return func(*args, **(kwargs or {}))
        return self._discovery.watch(func, args, kwargs or {})
