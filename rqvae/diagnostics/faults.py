"""A compiler with faults: it edits the FX graph in front of a real compiler. What the diagnostic is tested with.

`node.meta["nn_module_stack"]` says which module a node is of, so that a fault sits in one module wherever that is
compiled: by itself or inside a larger one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rqvae.diagnostics.compilers import Compiler, TorchCompiler
from rqvae.diagnostics.cuts import module_calls
from rqvae.diagnostics.ledger import GraphCompiler
from rqvae.diagnostics.units import ROOT, is_inside
from rqvae.errors import BadInput


def _nan(x: Tensor) -> Tensor:
    return x * float("nan")


def _one_inf(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.numel(), device=x.device).reshape(x.shape) == 0, float("inf"), x)


def _dtype(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float32 else torch.float32)


def _shape(x: Tensor) -> Tensor:
    return x[..., :-1]


def _scale(x: Tensor) -> Tensor:
    return x * 1.05


def _shift(x: Tensor) -> Tensor:
    return x + 0.1 * x.abs().mean()


def _noise(x: Tensor) -> Tensor:
    wave = torch.cos(torch.arange(x.numel(), device=x.device, dtype=torch.float32)).reshape(x.shape)
    return x + 0.01 * x.abs().mean() * wave.to(x.dtype)


def _flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _swap(x: Tensor) -> Tensor:
    return x.roll(1, 1)


def _clip(x: Tensor) -> Tensor:
    limit = 0.5 * x.abs().amax()
    return torch.where(x.abs() > limit, limit * x.sign(), x)


def _round(x: Tensor) -> Tensor:
    coarse = torch.float8_e4m3fn if x.dtype == torch.bfloat16 else torch.bfloat16
    return x.to(coarse).to(x.dtype)


def _blank(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 0.5)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": _nan,
    "inf": _one_inf,
    "dtype": _dtype,
    "shape": _shape,
    "scale": _scale,
    "shift": _shift,
    "noise": _noise,
    "flip": _flip,
    "swap": _swap,
    "clip": _clip,
    "round": _round,
    "blank": _blank,
    "constant": _constant,
}
"""Faults of numbers: a function of the module's output, put into the graph."""
KINDS = ("compile_raise", "runtime_raise", *EDITS)
"""Kinds of faults that a process survives; `crash` and `hang` are the others."""


def _raise(*_: Any) -> Any:
    raise RuntimeError("injected: the compiled code fails")


def _crash(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(*_: Any) -> Any:
    time.sleep(3600)


_AT_RUN_TIME = {"runtime_raise": _raise, "crash": _crash, "hang": _hang}


class FaultyCompiler(Compiler):
    """A real compiler, with faults in chosen modules and in graphs that hold chosen operations together.

    Args:
        faults: `PATH:KIND` each, see `KINDS`; `crash` and `hang` are taken too.
        together: names of operations, for example `group_norm` and `interpolate`: a graph with all of them returns
            zeros. The case of Stable Diffusion XL on Gaudi (huggingface/optimum-habana, pull request 2000).
        inner: the real compiler, a name of `torch.compile`'s list.
    """

    def __init__(self, faults: Sequence[str] = (), together: Sequence[str] = (), inner: str = "aot_eager") -> None:
        self.inner, self.together = TorchCompiler(inner), tuple(together)
        self.name = f"faulty {inner}"
        self.faults: list[tuple[str, str]] = []
        for text in faults:
            path, _, kind = text.rpartition(":")
            if kind not in (*EDITS, *_AT_RUN_TIME, "compile_raise"):
                raise BadInput(f"faults: expected PATH:KIND with a kind of {', '.join(KINDS)}, got {text}")
            self.faults.append((path, kind))
        self._made: dict[Any, GraphCompiler] = {}

    def check(self, device_name: str) -> None:
        self.inner.check(device_name)

    def graph_compiler(self, path: str) -> GraphCompiler:
        inside = [(target, kind) for target, kind in self.faults if is_inside(target, path)]
        if not inside and not self.together:
            return self.inner.graph_compiler(path)
        key = (path, tuple(inside)) if inside else "together"
        return self._made.setdefault(key, self._faulty(path, inside))

    def _faulty(self, path: str, faults: Sequence[tuple[str, str]]) -> GraphCompiler:
        def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            instead = None
            for target, kind in faults:
                relative = "" if target == path else target.removeprefix("" if path == ROOT else f"{path}.")
                nodes = _last_nodes(graph.graph, relative)
                if not nodes:
                    continue
                if kind == "compile_raise":
                    raise RuntimeError("injected: the compiler fails")
                instead = instead or _AT_RUN_TIME.get(kind)
                for node in nodes if kind in EDITS else ():
                    _insert_after(graph.graph, node, EDITS[kind])
            if self.together and all(_holds(graph.graph, name) for name in self.together):
                for node in _last_nodes(graph.graph, ""):
                    _insert_after(graph.graph, node, _blank)
            graph.recompile()
            return instead or self.inner.graph_compiler(path)(graph, inputs)

        return compile_graph


def _last_nodes(graph: torch.fx.Graph, relative: str) -> list[torch.fx.Node]:
    """The last node of each call of the module at a relative path; of the compiled module itself, what it returns."""
    if not relative:
        output = next(node for node in graph.nodes if node.op == "output")
        return [node for node in dict.fromkeys(output.all_input_nodes) if _is_float(node)]
    last: dict[str, torch.fx.Node] = {}
    for node in graph.nodes:
        for key, path in module_calls(node):
            if path == relative and _is_float(node):
                last[key] = node
    return list(last.values())


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.is_floating_point()


def _insert_after(graph: torch.fx.Graph, node: torch.fx.Node, edit: Callable[[Tensor], Tensor]) -> None:
    """Let all that used `node` use `edit(node)`."""
    place = node
    while place.op == "placeholder" and place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        changed = graph.call_function(edit, (node,))
    changed.meta = dict(node.meta)
    node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)


def _holds(graph: torch.fx.Graph, operation: str) -> bool:
    return any(operation in str(getattr(node.target, "__name__", node.target)) for node in graph.nodes)
