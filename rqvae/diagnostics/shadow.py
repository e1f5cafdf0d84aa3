"""The shadow decode: one eager decode, in whose hooks each unit's clone runs compiled on the live input.

The decode itself stays eager, so that a unit's verdict does not depend on another unit's compiled code. Nothing is
stored: all activations of the decoder of Stable Diffusion XL would take 60 GB at 1024 px, this takes one more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rqvae.diagnostics.compare import Status, Verdict, judge, tensors_of
from rqvae.diagnostics.compiled import CompiledUnit, Execution, is_slower
from rqvae.diagnostics.survey import Decode, Survey

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """One call of one unit, compiled beside eager.

    Args:
        verdict: status and figures.
        execution: what the compiled call did; its output is dropped.
        eager_seconds: of the module itself, without what ran in hooks below it.
    """

    verdict: Verdict
    execution: Execution
    eager_seconds: float


OnUnit = Callable[[str, list[Call]], None]
"""Told of a unit once all its calls have been seen."""


class ShadowDecode:
    """Hooks of one shadow decode.

    Args:
        units: path -> compiled unit; the ones to test.
        survey: of the same decode.
        on_unit: told of each unit as it ends.
        on_begin: told of a unit before it is compiled, so that a crash can be blamed.
        blank_std: see `rqvae.diagnostics.compare.judge`.
    """

    def __init__(
        self,
        units: Mapping[str, CompiledUnit],
        survey: Survey,
        on_unit: OnUnit,
        on_begin: Callable[[str], None],
        blank_std: float,
    ) -> None:
        self._units = {path: unit for path, unit in units.items() if path not in survey.nonfinite}
        self._survey, self._on_unit, self._on_begin, self._blank_std = survey, on_unit, on_begin, blank_std
        self._calls: dict[str, list[Call]] = {}
        self._open: list[tuple[float, float, Any]] = []
        self._spent = 0.0

    def run(self, decode: Decode) -> Tensor:
        """Decode; returns the (eager) image."""
        handles = []
        try:
            for path, compiled in self._units.items():
                module = compiled.unit.module
                handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(path, compiled), with_kwargs=True))
            with torch.no_grad():
                return decode()
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        mutating = path in self._survey.mutating

        def hook(_: nn.Module, arguments: Any, keywords: Any) -> None:
            kept = pytree.tree_map(_copied, (arguments, keywords)) if mutating else None
            self._open.append((time.perf_counter(), self._spent, kept))

        return hook

    def _after(self, path: str, compiled: CompiledUnit) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            ended = time.perf_counter()
            started, spent, kept = self._open.pop()
            eager_seconds = ended - started - (self._spent - spent)
            if path not in self._calls:
                self._on_begin(path)
            given, named = kept if kept is not None else (arguments, keywords)
            call = compare_call(compiled, given, named, output, eager_seconds, self._blank_std)
            calls = self._calls.setdefault(path, [])
            calls.append(call)
            if len(calls) == self._survey.calls[path]:
                self._on_unit(path, calls)
            self._spent += time.perf_counter() - ended

        return hook


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def compare_call(
    compiled: CompiledUnit, arguments: Any, keywords: Any, output: Any, eager_seconds: float, blank_std: float
) -> Call:
    """Run a unit compiled on the inputs of an eager call and judge it by that call's output."""
    execution = compiled.run(arguments, keywords)
    if execution.status is not Status.OK:
        words = execution.failure.message if execution.failure else ""
        return Call(Verdict(execution.status, words=words), execution, eager_seconds)
    low = any(t.dtype in _LOW for t in tensors_of(output))
    gold = compiled.gold(arguments, keywords, torch.float32) if low else None
    verdict = judge(output, execution.output, gold, blank_std)
    if verdict.status is Status.MISMATCH and not low and verdict.figures is not None:
        # ill-conditioned inputs, such as a constant channel before a norm, make fp32 code differ: float64 decides
        verdict = judge(output, execution.output, compiled.gold(arguments, keywords, torch.float64), blank_std)
    execution.output = None
    run_seconds = execution.run_seconds
    if eager_seconds and run_seconds is not None and is_slower(run_seconds, eager_seconds):
        eager_seconds, execution.run_seconds = compiled.least_seconds(arguments, keywords, eager_seconds, run_seconds)
    return Call(verdict, execution, eager_seconds)
