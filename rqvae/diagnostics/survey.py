"""The first, eager decode: which units are called, when, with what; which change their inputs; which overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rqvae.diagnostics.compare import tensors_of
from rqvae.diagnostics.compiled import describe_arguments
from rqvae.diagnostics.units import Unit

Decode = Callable[[], Tensor]
"""Decodes the subject's latent to an image (B, 3, H, W) in [0, 1], not clamped."""


@dataclass
class Survey:
    """What the eager decode showed.

    Args:
        image: (B, 3, H, W) its image, the reference.
        order: paths in the order in which their first calls ended: a module comes after what is inside it.
        calls: path -> number of calls.
        signatures: path -> types and shapes of the inputs of each call.
        peaks: path -> largest |output|.
        nonfinite: path -> whether its inputs were finite; the units whose eager output is not finite.
        mutating: paths of units that change an input in place.
        passing: paths of units that return an input as it is at every call (`nn.Identity`): nothing to compile.
    """

    image: Tensor
    order: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    signatures: dict[str, list[str]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    nonfinite: dict[str, bool] = field(default_factory=dict)
    mutating: set[str] = field(default_factory=set)
    passing: set[str] = field(default_factory=set)

    def add(self, path: str, signature: str, mutated: bool, passed: bool) -> None:
        """Note a call; `mutated`: it changed an input, `passed`: it returned one."""
        if path not in self.calls:
            self.order.append(path)
            self.passing.add(path)
        if mutated:
            self.mutating.add(path)
        if mutated or not passed:
            self.passing.discard(path)
        self.calls[path] = self.calls.get(path, 0) + 1
        self.signatures.setdefault(path, []).append(signature)

    @property
    def first_nonfinite(self) -> str | None:
        """The first unit that made something not finite out of finite inputs; an inner one before what is around it."""
        return next((path for path in self.order if self.nonfinite.get(path)), None)


def survey(decode: Decode, units: Sequence[Unit]) -> Survey:
    """Decode once, eager, and look at every unit's calls."""
    seen = Survey(torch.empty(0))
    open_calls: list[tuple[list[int], Tensor, str]] = []
    facts: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def before(_: nn.Module, arguments: Any, keywords: Any) -> None:
        given = tensors_of((arguments, keywords))
        versions = [tensor._version for tensor in given]
        open_calls.append((versions, _finite(given), describe_arguments((arguments, keywords))))

    def after(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            versions, finite, signature = open_calls.pop()
            given = tensors_of((arguments, keywords))
            mutated = [tensor._version for tensor in given] != versions
            seen.add(path, signature, mutated, any(output is tensor for tensor in given))
            facts.append((path, finite, _finite(output), _peak(output)))

        return hook

    handles = []
    try:
        for unit in (unit for unit in units if not unit.container):
            handles.append(unit.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(unit.module.register_forward_hook(after(unit.path), with_kwargs=True))
        with torch.no_grad():
            seen.image = decode()
    finally:
        for handle in handles:
            handle.remove()
    # read at the end and at once: each read of a lazy device is a graph of its own, with all that leads up to it
    columns = [torch.stack([a.float(), b.float(), c]).to(seen.image.device) for _, a, b, c in facts]
    values = torch.stack(columns).tolist() if columns else []
    for (path, *_), (inputs_finite, finite, peak) in zip(facts, values, strict=True):
        seen.peaks[path] = max(seen.peaks.get(path, 0.0), peak)
        if not finite:
            seen.nonfinite[path] = seen.nonfinite.get(path, False) or bool(inputs_finite)
    return seen


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in tensors_of(tree) if t.is_floating_point() and t.numel()]


def _finite(tree: Any) -> Tensor:
    """Whether all floating-point values are finite, on the device."""
    found = [t.isfinite().all() for t in _floats(tree)]
    return torch.stack(found).all() if found else _on_its_device(tree, True)


def _peak(tree: Any) -> Tensor:
    """Largest |value|, on the device."""
    found = [t.abs().max().float() for t in _floats(tree)]
    return torch.stack(found).max() if found else _on_its_device(tree, 0.0)


def _on_its_device(tree: Any, value: float) -> Tensor:
    tensors = tensors_of(tree)
    return torch.tensor(value, device=tensors[0].device if tensors else None)
