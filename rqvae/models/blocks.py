"""The repeated blocks of a network: what is compiled and what is computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def listed_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost `nn.ModuleList`s of a network, in the order of its modules, each once."""
    found: dict[int, nn.Module] = {}
    for child in module.children():
        inside = list(child) if isinstance(child, nn.ModuleList) else listed_blocks(child)
        found |= {id(block): block for block in inside}
    return list(found.values())


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let these blocks keep only their inputs for the backward pass and compute the rest again (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost"); dropout draws the same numbers again.

    A block becomes an instance of a subclass of its class. Names in its state_dict stay, `isinstance` says the same,
    and a deep copy computes with its own weights; with a `forward` set on the instance it would use the original's.
    Call it before compiling.

    Args:
        blocks: modules whose `forward` changes nothing but its random numbers.
    """
    for block in blocks:
        block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]


@functools.cache
def _recomputed(kind: type) -> type:
    """One class a block's class: blocks of one class are then compiled once, not each by itself."""
    return type(kind.__name__, (_Recomputed, kind), {"__module__": kind.__module__})


class _Recomputed(nn.Module):
    """In front of a block's class: its forward is done again in the backward pass."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*arguments, **keywords)
        return checkpoint(super().forward, *arguments, use_reentrant=False, preserve_rng_state=True, **keywords)
