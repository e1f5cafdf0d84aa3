"""What a compiler made and what of it really ran: without this, what fell back to eager passes every comparison."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

GraphCompiler = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""A backend of `torch.compile`: from a graph and its inputs to a callable."""


@dataclass(frozen=True)
class Graph:
    """One compiled graph.

    Args:
        number: from 0, in the order of compilation.
        nodes: calls in it.
        compile_seconds: spent in the compiler, without tracing.
        break_reason: why the graph ended before its module did; None where it did not.
        lines: where, as `file:line`.
    """

    number: int
    nodes: int
    compile_seconds: float
    break_reason: str | None = None
    lines: tuple[str, ...] = ()


@dataclass
class Watch:
    """What happened during one call: graphs made, graphs run, seconds inside them, and whether one raised."""

    compiled: list[Graph] = field(default_factory=list)
    executed: list[Graph] = field(default_factory=list)
    seconds: float = 0.0
    raised: bool = False


@dataclass
class Ledger:
    """All compiled graphs, and the call that is being watched."""

    graphs: list[Graph] = field(default_factory=list)
    _watch: Watch = field(default_factory=Watch)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Note what is compiled and run within."""
        before, self._watch = self._watch, Watch()
        try:
            yield self._watch
        finally:
            self._watch = before

    def counting(self, inner: GraphCompiler) -> GraphCompiler:
        """The same compiler, whose graphs and their runs are noted here."""

        def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            started = time.perf_counter()
            compiled = inner(graph, inputs)
            return self.entry(compiled, graph, time.perf_counter() - started)

        return compile_graph

    def entry(
        self, compiled: Callable[..., Any], graph: torch.fx.GraphModule | None, seconds: float
    ) -> Callable[..., Any]:
        """Add a compiled graph (None: one that is not of FX) and return its call, noted."""
        reason, lines = _break_of(graph)
        nodes = 0 if graph is None else sum(node.op.startswith("call") for node in graph.graph.nodes)
        made = Graph(len(self.graphs), nodes, seconds, reason, lines)
        self.graphs.append(made)
        self._watch.compiled.append(made)

        def call(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            self._watch.executed.append(made)
            try:
                return compiled(*arguments, **keywords)
            except Exception:
                self._watch.raised = True
                raise
            finally:
                self._watch.seconds += time.perf_counter() - started

        return call


def _break_of(graph: torch.fx.GraphModule | None) -> tuple[str | None, tuple[str, ...]]:
    """Reason and lines of the break that ended a graph; dynamo notes it on the graph (`GraphCompileReason`)."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None, ()
    return " ".join(str(reason.reason).split())[:300], tuple(f"{f.filename}:{f.lineno}" for f in reason.user_stack)
