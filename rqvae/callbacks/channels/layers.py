"""Which modules of a network are tracked: by globs over their names, or by the names of their classes."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rqvae.errors import BadInput

_CHANNELS_FIRST = ("out_channels", "num_channels", "num_features")
_CHANNELS_LAST = ("out_features", "normalized_shape")


@dataclass(frozen=True)
class Layer:
    """A tracked module.

    Args:
        name: in the network.
        module: itself.
        channels: of its output.
        channels_last: whether they are the output's last axis (Linear, LayerNorm) and not its second one.
        start: place of its first channel among those of all tracked layers.
    """

    name: str
    module: nn.Module
    channels: int
    channels_last: bool
    start: int

    @property
    def stop(self) -> int:
        """Place after its last channel."""
        return self.start + self.channels

    @property
    def is_norm(self) -> bool:
        """Whether it scales and shifts each channel by one number, gamma and beta."""
        weight = getattr(self.module, "weight", None)
        return isinstance(weight, Tensor) and tuple(weight.shape) == (self.channels,)


def channels_of(module: nn.Module) -> tuple[int, bool] | None:
    """A module's channels and whether they are its output's last axis; None where it has none that it tells."""
    for name in _CHANNELS_FIRST:
        if isinstance(count := getattr(module, name, None), int):
            return count, False
    for name in _CHANNELS_LAST:
        count = getattr(module, name, None)
        if isinstance(count, Sequence) and len(count) == 1:
            count = count[0]
        if isinstance(count, int):
            return count, True
    return None


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no parts but what `torch.nn.utils.parametrize` adds."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without parts that have channels, by name; one that has two names comes once."""
    for name, module in model.named_modules():
        if name and is_leaf(module) and channels_of(module) is not None:
            yield name, module


def find_layers(model: nn.Module, patterns: Sequence[str]) -> list[Layer]:
    """The modules that any of the patterns names, in the network's order.

    Args:
        model: the network.
        patterns: globs over module names, or names of module classes.

    Raises:
        BadInput: a pattern that names nothing, with what is close to it.
    """
    known = dict(candidates(model))
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n, m in known.items() if fnmatch.fnmatchcase(n, pattern) or type(m).__name__ == pattern}
        if not hits:
            raise BadInput(f"layers: expected a module name, a glob over them or a module class, got {pattern!r}, "
                           f"which names none of {type(model).__name__}{_near(pattern, known)}")  # fmt: skip
        found |= hits
    layers: list[Layer] = []
    for name, module in known.items():
        if name in found:
            channels, last = channels_of(module) or (0, False)
            layers.append(Layer(name, module, channels, last, layers[-1].stop if layers else 0))
    return layers


def _near(pattern: str, known: dict[str, nn.Module]) -> str:
    """What a user may have meant."""
    kinds = sorted({type(module).__name__ for module in known.values()})
    near = difflib.get_close_matches(pattern, [*known, *kinds], 3, 0.5)
    classes = f"; its classes are {', '.join(kinds)}"
    return f"; did you mean {' or '.join(near)}?" if near else classes
