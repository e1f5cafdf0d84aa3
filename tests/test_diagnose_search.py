"""The search for modules that are right alone and wrong together, on the real decoder with compiled code in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rqvae.diagnostics.compilers import TorchCompiler
from rqvae.diagnostics.faults import EDITS, FaultyCompiler
from rqvae.diagnostics.ledger import GraphCompiler
from rqvae.diagnostics.search import smallest_failing
from rqvae.diagnostics.session import Diagnosis
from tests.diagnoses import Silent, flagged, small

LEAVES = 83
"""Submodules without children in a small decoder with five residual blocks in each of two resolutions."""
KINDS = ("nan", "flip", "noise", "blank", "constant", "swap")


class Conspiring(FaultyCompiler):
    """Each module's compiled code is right unless that of all of a set has run in the same decode: then the output of
    the last of them is wrong, once: two flips in a row, around what works on each element alone, would be right again.
    The set can change without compiling again."""

    def __init__(self) -> None:
        super().__init__(inner="eager")
        self.culprits: frozenset[str] = frozenset()
        self.kind = KINDS[0]
        self.ran: set[str] = set()
        self.wrong = False
        self._own: dict[str, GraphCompiler] = {}

    def graph_compiler(self, path: str) -> GraphCompiler:
        return self._own.setdefault(path, lambda graph, inputs: self._watched(path, graph, inputs))

    def _watched(self, path: str, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = self.inner.graph_compiler(path)(graph, inputs)

        def call(*arguments: Any) -> Any:
            output = compiled(*arguments)
            if path not in self.culprits:
                return output
            self.ran.add(path)
            if self.wrong or not self.ran >= self.culprits:
                return output
            self.wrong = True
            return tuple(EDITS[self.kind](o) for o in output)

        return call


@dataclass
class Compiled:
    """A diagnosis whose units are all compiled, and the compiler that its faults are set in."""

    diagnosis: Diagnosis
    compiler: Conspiring
    leaves: list[str]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    torch.set_num_threads(1)
    compiler = Conspiring()
    subject = small(widths=(8, 8), layers=4)
    decode = subject.decode

    def fresh(z: Tensor) -> Tensor:
        compiler.ran.clear()
        compiler.wrong = False
        return decode(z)

    subject.decode = fresh
    with Diagnosis(subject, compiler) as diagnosis:
        leaves = [path for path in diagnosis.survey.order if diagnosis.units[path].leaf]
        assert len(leaves) == LEAVES
        rows = diagnosis.single(leaves, {}, "shadow", Silent())
        assert not flagged({row["path"]: row for row in rows})
        yield Compiled(diagnosis, compiler, leaves, rows)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "most"), [(1, 10), (2, 18), (3, 26)])
def test_drawn_sets_are_found_exactly_in_few_decodes_and_nothing_is_compiled(
    size: int, most: int, compiled: Compiled, record_property: Callable[[str, object], None]
) -> None:
    """50 sets, drawn anew at each call; `fail_on_recompile` makes torch refuse to compile.

    A set whose fault the image does not show is drawn again: noise of 1 % on the values of a nearly uniform attention
    moves the image by 4.5e-5, half of what is called wrong.
    """
    diagnosis, compiler, draw = compiled.diagnosis, compiled.compiler, random.Random()
    made, torchs = len(diagnosis.ledger.graphs), dict(counters["stats"])
    units = {path: diagnosis.compiled(path) for path in compiled.leaves}

    def fails(paths: Sequence[str]) -> bool:
        return diagnosis.decode_switched([units[path] for path in paths]).is_bad

    exact, decodes, unseen = 0, [], 0
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(50):
            before = -1
            while before < 0 or not fails(compiled.leaves):
                unseen += before >= 0
                compiler.culprits, compiler.kind = frozenset(draw.sample(compiled.leaves, size)), draw.choice(KINDS)
                before = diagnosis.decodes
            found = smallest_failing(compiled.leaves, fails)
            decodes.append(diagnosis.decodes - before)
            exact += set(found) == compiler.culprits
    compiler.culprits = frozenset()
    record_property("decodes", f"mean {sum(decodes) / 50:.1f}, most {max(decodes)}; exact {exact} of 50")
    print(f"{size} of {LEAVES}: decodes mean {sum(decodes) / 50:.1f}, most {max(decodes)}; exact {exact} of 50")
    assert unseen <= 5
    assert max(decodes) <= most
    assert exact >= 48
    assert len(diagnosis.ledger.graphs) == made
    assert dict(counters["stats"]) == torchs


@pytest.mark.slow
def test_the_diagnosis_reports_the_set(compiled: Compiled) -> None:
    """Its own search: two tests more, of all leaves and of what is left."""
    compiled.compiler.culprits = frozenset({"mid_block.resnets.0.conv1", "up_blocks.1.resnets.1.norm2"})
    compiled.compiler.kind = "flip"
    before = compiled.diagnosis.decodes
    found = compiled.diagnosis.interactions(compiled.rows)
    compiled.compiler.culprits = frozenset()
    assert found == [["mid_block.resnets.0.conv1", "up_blocks.1.resnets.1.norm2"]]
    assert compiled.diagnosis.decodes - before <= 19


@pytest.mark.slow
def test_a_diagnosis_without_interactions_decodes_once(compiled: Compiled) -> None:
    before = compiled.diagnosis.decodes
    assert compiled.diagnosis.interactions(compiled.rows) == []
    assert compiled.diagnosis.decodes - before == 1
    assert isinstance(compiled.compiler.inner, TorchCompiler)
