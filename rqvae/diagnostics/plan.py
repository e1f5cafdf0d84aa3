"""compile_plan.yaml: which submodules of a decoder to compile, where to cut their graphs, which to leave eager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from rqvae.backends import Backend
from rqvae.backends.compiling import compile_in_place
from rqvae.diagnostics.compiled import sharing_clone
from rqvae.diagnostics.compilers import find_compiler
from rqvae.diagnostics.cuts import cutting
from rqvae.diagnostics.ledger import GraphCompiler, Ledger
from rqvae.diagnostics.units import ROOT, is_inside, walk
from rqvae.errors import BadInput


@dataclass(frozen=True)
class CompilePlan:
    """What to compile of a decoder.

    Args:
        root: name of the decoder within the model; the first module whose path ends with it.
        compiler: as `--backend` takes it.
        compile: paths within the root; none lies inside another.
        breaks: path -> relative paths in front of which its graph is cut.
        eager: paths that stay eager, for the reader; what is not in `compile` stays eager in any case.
        subject: what it was found on, for the reader.
    """

    root: str = "decoder"
    compiler: str = "inductor"
    compile: Sequence[str] = ()
    breaks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    eager: Sequence[str] = ()
    subject: str = ""

    def write(self, path: Path) -> None:
        """Write it as YAML."""
        values = asdict(self)
        values["compile"], values["eager"] = list(self.compile), list(self.eager)
        values["breaks"] = {key: list(cuts) for key, cuts in self.breaks.items()}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def read_plan(path: Path) -> CompilePlan:
    """A plan from its file.

    Raises:
        BadInput: no such file, no YAML mapping, an unknown key, or a key of another type.
    """
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(
            f"--compile_plan: expected a file that `diagnose` wrote, got {path}, which is not there"
        ) from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected keys and values, got {type(values).__name__}")
    kinds = {"root": str, "compiler": str, "compile": list, "breaks": dict, "eager": list, "subject": str}
    for key, value in values.items():
        if key not in kinds:
            raise BadInput(f"{path}: {key}: unknown; expected one of {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise BadInput(f"{path}: {key}: expected {kinds[key].__name__}, got {type(value).__name__}")
    plan = CompilePlan(**values)
    nested = [(a, b) for a in plan.compile for b in plan.compile if a != b and is_inside(a, b)]
    if nested:
        raise BadInput(f"{path}: compile: expected paths outside each other, got {nested[0][0]} inside {nested[0][1]}")
    return plan


def find_root(model: nn.Module, name: str, where: str = "--root") -> tuple[str, nn.Module]:
    """Path and module of the first submodule whose path is `name` or ends with `.name`.

    Raises:
        BadInput: there is none.
    """
    for path, module in model.named_modules():
        if path == name or path.endswith(f".{name}"):
            return path, module
    parts = ", ".join(child for child, _ in model.named_children())
    raise BadInput(f"{where}: expected a submodule of {type(model).__name__} ({parts}, ...), got {name}")


def apply_plan(plan: CompilePlan, model: nn.Module, backend: Backend, where: str = "compile plan") -> list[str]:
    """Compile exactly the units of a plan, in place; returns their paths. Call it after moving the model to its device.

    Raises:
        BadInput: a unit or a cut that the model does not have, or a compiler that this machine does not have.
    """
    _, root = find_root(model, plan.root, f"{where}: root")
    units = {unit.path: unit for unit in walk(root)}
    compiler = find_compiler(plan.compiler)
    compiler.check(backend.name)
    for path, cuts in {**dict.fromkeys(plan.compile, ()), **plan.breaks}.items():
        prefix = "" if path == ROOT else f"{path}."
        for wanted in (path, *(f"{prefix}{cut}" for cut in cuts)):
            if wanted not in units:
                raise BadInput(f"{where}: expected submodules of {plan.root}, got unknown {wanted}")
    for path in plan.compile:
        cuts = plan.breaks.get(path, ())
        if not compiler.has_graphs:
            module = units[path].module
            module._compiled_call_impl = compiler.compile(sharing_clone(module), path, Ledger(), cuts)
            continue
        inner: GraphCompiler = compiler.graph_compiler(path)
        compile_in_place(units[path].module, cutting(inner, cuts) if cuts else inner)
    return list(plan.compile)
