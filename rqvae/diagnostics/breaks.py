"""Where to cut a graph that is bad as a whole though each of its parts is good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.compiled import CompiledUnit
from rqvae.diagnostics.compilers import Compiler
from rqvae.diagnostics.ledger import Ledger
from rqvae.diagnostics.shadow import compare_call
from rqvae.diagnostics.survey import Decode, Survey
from rqvae.diagnostics.units import ROOT, Unit, is_inside


@dataclass(frozen=True)
class Cut:
    """A cut of one unit's graph that was tried.

    Args:
        path: of the unit.
        before: relative path of the submodule in front of which it is cut.
        status: of the unit with this cut.
    """

    path: str
    before: str
    status: str

    @property
    def works(self) -> bool:
        """Whether the unit is right with this cut."""
        return self.status == Status.OK.value


def candidates(unit: Unit, survey: Survey, units: Sequence[Unit]) -> list[str]:
    """Relative paths in front of which a unit can be cut: its called children, and the members of its containers.

    The last called comes first: a late cut keeps the larger graph whole.
    """
    prefix = "" if unit.path == ROOT else f"{unit.path}."
    inside = [u for u in units if u.path != unit.path and is_inside(u.path, unit.path) and u.path in survey.calls]
    paths = {u.path for u in inside}
    outermost = [p for p in paths if not any(q != p and is_inside(p, q) for q in paths)]
    return [path.removeprefix(prefix) for path in sorted(outermost, key=survey.order.index, reverse=True)][:-1]


class CutSearch:
    """Tries cuts of bad units on their live inputs, in one eager decode for all of them.

    Args:
        compiler: compiles the parts.
        ledger: where graphs are noted.
        device: of the weights.
        blank_std: see `rqvae.diagnostics.compare.judge`.
    """

    def __init__(self, compiler: Compiler, ledger: Ledger, device: torch.device, blank_std: float) -> None:
        self._compiler, self._ledger, self._device, self._blank_std = compiler, ledger, device, blank_std
        self.tried: list[Cut] = []

    def run(self, decode: Decode, tries: Mapping[str, tuple[Unit, Sequence[str]]]) -> list[Cut]:
        """The cuts that heal, the first per unit; `tries` has, by path, a unit and the cuts to try in this order."""
        handles = []
        compiled = {
            path: [(cut, CompiledUnit(unit, self._compiler, self._ledger, self._device, (cut,))) for cut in cuts]
            for path, (unit, cuts) in tries.items()
        }
        try:
            for path, (unit, _) in tries.items():
                handles.append(unit.module.register_forward_hook(self._hook(path, compiled[path]), with_kwargs=True))
            with torch.no_grad():
                decode()
        finally:
            for handle in handles:
                handle.remove()
        works = [cut for cut in self.tried if cut.works]
        return [cut for i, cut in enumerate(works) if cut.path not in {earlier.path for earlier in works[:i]}]

    def _hook(self, path: str, attempts: Sequence[tuple[str, CompiledUnit]]) -> Any:
        def hook(_: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            if any(cut.path == path for cut in self.tried):
                return  # the first call decides
            for before, compiled in attempts:
                call = compare_call(compiled, arguments, keywords, output, 0.0, self._blank_std)
                self.tried.append(Cut(path, before, call.verdict.status.value))
                if self.tried[-1].works:
                    return

        return hook
