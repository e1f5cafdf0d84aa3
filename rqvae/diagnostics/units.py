"""The submodules of a decoder as units that can be compiled by themselves: walking, filtering, covering, listing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rqvae.errors import BadInput

ROOT = "<root>"
"""The path of the decoder itself."""

Filter = Literal["all", "leaf", "non-leaf"]
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Unit:
    """One submodule.

    Args:
        path: its name within the root, `<root>` for the root itself.
        module: the module.
        leaf: it has no children. An empty list among the children is a child.
        container: it holds modules and cannot be called.
    """

    path: str
    module: nn.Module
    leaf: bool
    container: bool

    @property
    def type_name(self) -> str:
        """The class's name, as the module was before anything was compiled."""
        return type(self.module).__name__

    @property
    def parents(self) -> list[str]:
        """Paths of the modules around it, the root first."""
        if self.path == ROOT:
            return []
        parts = self.path.split(".")
        return [ROOT, *(".".join(parts[:i]) for i in range(1, len(parts)))]


def walk(root: nn.Module) -> list[Unit]:
    """The root and all its submodules, in the order of `named_modules`, each object once."""
    units = []
    for name, module in root.named_modules():
        has_forward = type(module).forward is not nn.Module.forward
        container = isinstance(module, _LISTS) or not has_forward
        units.append(Unit(name or ROOT, module, next(module.children(), None) is None, container))
    return units


def is_inside(path: str, outer: str) -> bool:
    """Whether `path` is `outer` or lies under it."""
    return outer == ROOT or path == outer or path.startswith(f"{outer}.")


def select(units: Sequence[Unit], which: Filter) -> list[Unit]:
    """The units of a kind; a container is a non-leaf.

    Raises:
        BadInput: nothing is left.
    """
    chosen = [unit for unit in units if which == "all" or unit.leaf == (which == "leaf")]
    if not chosen:
        raise BadInput(f"--filter {which}: expected at least one such submodule, the decoder has none")
    return chosen


def covering(units: Sequence[Unit], excluded: Iterable[str]) -> list[Unit]:
    """The largest units that neither are an excluded one, nor contain one, nor lie under one.

    Together they cover everything but the excluded modules and the own code of the modules around those, each module
    once. Containers are never in it, their members are.

    Args:
        units: all of a root, from `walk`.
        excluded: paths that stay eager; several are one set.
    """
    left_out = set(excluded)
    chosen: list[Unit] = []
    for unit in units:
        touched = any(is_inside(unit.path, path) or is_inside(path, unit.path) for path in left_out)
        covered = any(is_inside(unit.path, other.path) for other in chosen)
        if not (touched or covered or unit.container):
            chosen.append(unit)
    return chosen


def parse_paths(text: str, units: Sequence[Unit], option: str) -> list[str]:
    """Paths from a file, one a line with `#` comments and blank lines, or from a list with commas between them.

    Args:
        text: the option's value: an existing file, else a list.
        units: what may be named.
        option: its name, for errors.

    Returns:
        The paths, each once, in the order given.

    Raises:
        BadInput: a path that the decoder does not have (close ones are named), no path at all, or no such file.
    """
    file = Path(text).expanduser()
    try:
        is_file = file.is_file()
    except OSError:  # a list of paths may be longer than a file's name can be
        is_file = False
    if is_file:
        entries = [line.split("#")[0] for line in file.read_text(encoding="utf-8").splitlines()]
        where = f"{option} {text}"
    else:
        if text.endswith(".txt") or "/" in text:
            raise BadInput(f"{option}: expected a file with one path a line, or paths with commas, no file {text}")
        entries, where = text.split(","), option
    paths = list(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))
    if not paths:
        raise BadInput(f"{where}: expected at least one path of a submodule, got none")
    known = [unit.path for unit in units]
    for path in paths:
        if path not in known:
            near = difflib.get_close_matches(path, known, 3, 0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "--list_submodules lists them"
            raise BadInput(f"{where}: expected paths of submodules, got unknown {path}; {hint}")
    return paths


def tree_text(units: Sequence[Unit]) -> str:
    """The submodules as an indented tree: path, class, parameters."""
    lines = []
    for unit in units:
        note = " (container, not called)" if unit.container else ""
        count = sum(p.numel() for p in unit.module.parameters())
        lines.append(f"{'  ' * len(unit.parents)}{unit.path}: {unit.type_name}, {count:,} parameters{note}")
    return "\n".join(lines) + "\n"


def tree_json(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The same for programs: path, type, leaf, parameters, whether it is compilable, other names of the object."""
    names: dict[int, list[str]] = {}
    for name, module in units[0].module.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name or ROOT)
    return [
        {
            "path": unit.path,
            "type": unit.type_name,
            "leaf": unit.leaf,
            "parameters": sum(p.numel() for p in unit.module.parameters()),
            "compilable": not unit.container,
            "also_at": names[id(unit.module)][1:],
        }
        for unit in units
    ]
