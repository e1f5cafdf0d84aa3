"""Graphs that are cut in front of a submodule: each part is compiled by itself, as if a graph break stood there.

A break in Python (`torch._dynamo.graph_break`) inside a loop makes dynamo give up the whole frame; a cut of the FX
graph is where it was asked for. `DDPOptimizer` of torch splits its graphs the same way
(torch/_dynamo/backends/distributed.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.passes.split_module import split_module

from rqvae.diagnostics.ledger import GraphCompiler


def relative_path(source: str) -> str:
    """The path within a compiled module of what dynamo calls `L['block']._modules['resnets']._modules['0'].norm1`."""
    while (found := re.fullmatch(r"getattr\((.*), '([^']*)'\)(.*)", source)) is not None:
        source = f"{found[1]}.{found[2]}{found[3]}"
    source = re.sub(r"^[LG]\['[^']*'\]", "", source)
    source = re.sub(r"\._modules\['([^']*)'\]", r".\1", source)
    return re.sub(r"\['?([^'\]]*)'?\]", r".\1", source).strip(".")


def module_calls(node: torch.fx.Node) -> list[tuple[str, str]]:
    """(key of the call, path) of the modules that a node is inside of, outermost first, without the compiled one."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), path) for key, (source, _) in stack.items() if (path := relative_path(str(source)))]


def partition(graph: torch.fx.Graph, cuts: Sequence[str]) -> dict[torch.fx.Node, int]:
    """The part, from 0, of each call: a new one begins at the first call inside each path of `cuts`."""
    parts: dict[torch.fx.Node, int] = {}
    ahead, part = set(cuts), 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        reached = ahead & {path for _, path in module_calls(node)}
        ahead -= reached
        part += bool(reached and parts)
        parts[node] = part
    return parts


class _Part(nn.Module):
    """One part, compiled at its first call: its inputs do not exist before."""

    def __init__(self, graph: torch.fx.GraphModule, compiler: GraphCompiler) -> None:
        super().__init__()
        self._graph, self._compiler = [graph], compiler  # in a list, so that it is no submodule
        self._compiled: Callable[..., Any] | None = None

    def forward(self, *inputs: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._compiler(self._graph[0], list(inputs))
        return self._compiled(*inputs)


def _unpacked(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler returns a tuple where the part's caller expects the one tensor of it."""

    def call(*inputs: Any) -> Any:
        output = compiled(*inputs)
        return output[0] if isinstance(output, tuple | list) else output

    return call


def cutting(inner: GraphCompiler, cuts: Sequence[str]) -> GraphCompiler:
    """A compiler that cuts each graph in front of the given paths and lets `inner` compile the parts.

    Args:
        inner: compiles one graph.
        cuts: paths relative to the module that is compiled; one that a graph does not have does not cut it.
    """

    def single(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        output = next(node for node in graph.graph.nodes if node.op == "output")
        if isinstance(output.args[0], tuple | list):
            return inner(graph, inputs)
        output.args = ((output.args[0],),)
        graph.recompile()
        return _unpacked(inner(graph, inputs))

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        parts = partition(graph.graph, cuts)
        if max(parts.values(), default=0) == 0:
            return inner(graph, inputs)
        whole: Any = split_module(graph, graph, lambda node: parts.get(node, 0), keep_original_order=True)
        for name, part in list(whole.named_children()):
            setattr(whole, name, _Part(part, single))
        return whole

    return compile_graph
