"""Compilers as plugins: a name that `torch.compile` knows, or a class of one's own by `class_path`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from rqvae.backends.compilers import check_hpu_graphs, compiled_call, hpu_graph, prepare_compiler
from rqvae.diagnostics.cuts import cutting
from rqvae.diagnostics.ledger import GraphCompiler, Ledger
from rqvae.errors import BadInput


class Compiler:
    """Makes compiled calls of modules. A plugin overrides `graph_compiler`, or `compile` where it has no FX graphs.

    Its constructor takes plain values, so that a command line or a config can give them as `init_args`.
    """

    name = "compiler"
    has_graphs = True
    """Whether it compiles FX graphs, which can be cut."""

    def check(self, device_name: str) -> None:
        """Raise BadInput, in one line, where this compiler cannot work on this machine."""

    def graph_compiler(self, path: str) -> GraphCompiler:
        """The backend for the unit at `path`. The same object for two units lets them share compiled graphs."""
        raise NotImplementedError(f"{type(self).__name__} compiles no FX graphs")

    def compile(self, module: nn.Module, path: str, ledger: Ledger, cuts: Sequence[str] = ()) -> Callable[..., Any]:
        """A compiled call of `module`, compiled at its first use; graphs and their runs are noted in `ledger`.

        Args:
            module: what is compiled, without hooks.
            path: its place in the decoder.
            ledger: where graphs are noted.
            cuts: relative paths in front of which its graphs are cut.
        """
        made = self.__dict__.setdefault("_backends", {})
        inner = self.graph_compiler(path)
        key = (id(ledger), inner, tuple(cuts))
        if key not in made:
            counted = ledger.counting(inner)
            made[key] = cutting(counted, cuts) if cuts else counted
        return compiled_call(module, made[key])


class TorchCompiler(Compiler):
    """A backend that `torch.compile` knows by name.

    Args:
        backend: for example inductor, aot_eager, eager, cudagraphs, openxla, hpu_backend.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.name = backend
        self._graph_compiler: GraphCompiler | None = None

    def check(self, device_name: str) -> None:
        prepare_compiler(self.name, device_name)
        if self.name not in torch._dynamo.list_backends(exclude_tags=()):
            known = ", ".join(sorted(torch._dynamo.list_backends()))
            raise BadInput(f"--backend: expected one of {known}, or a class path, got {self.name}")

    def graph_compiler(self, path: str) -> GraphCompiler:  # noqa: ARG002
        if self._graph_compiler is None:
            found: Any = torch._dynamo.lookup_backend(self.name)
            self._graph_compiler = found
        assert self._graph_compiler is not None
        return self._graph_compiler


class HpuGraphCompiler(Compiler):
    """HPU graphs: a module's operations are recorded on a Gaudi device at its first call and replayed afterwards."""

    name = "HPU graphs"
    has_graphs = False

    def check(self, device_name: str) -> None:
        check_hpu_graphs(device_name)

    def compile(self, module: nn.Module, path: str, ledger: Ledger, cuts: Sequence[str] = ()) -> Callable[..., Any]:  # noqa: ARG002
        if cuts:
            raise BadInput(f"--backend: expected a compiler of FX graphs, which can be cut, got {self.name}")
        replay = hpu_graph(module)
        noted: list[Callable[..., Any]] = []

        def call(*arguments: Any, **keywords: Any) -> Any:
            if not noted:  # recorded now, so that it counts as made in this call
                noted.append(ledger.entry(replay, None, 0.0))
            return noted[0](*arguments, **keywords)

        return call


def find_compiler(text: str) -> Compiler:
    """The compiler that `--backend` names.

    Args:
        text: a name of `torch.compile`'s list; a class path `package.module.Class`; or JSON with `class_path` and
            `init_args`.

    Raises:
        BadInput: JSON that cannot be read, a class that cannot be imported or is no `Compiler`, wrong arguments.
    """
    arguments: dict[str, Any] = {}
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
            text, arguments = given["class_path"], given.get("init_args", {})
        except (ValueError, KeyError) as error:
            raise BadInput(f"--backend: expected JSON with class_path and init_args, got {error}") from None
    if "." not in text:
        return TorchCompiler(text)
    module, _, name = text.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--backend: expected the path of a class, got {text}: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Compiler)):
        raise BadInput(f"--backend: expected a {Compiler.__module__}.Compiler, got {text}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise BadInput(f"--backend: {text}: {error}") from None
