"""A program's source as syntax trees, and the few shapes of code that checks look for, whatever its names are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rqvae.errors import BadInput

_SKIPPED = {".git", ".venv", "venv", "site-packages", "node_modules", "__pycache__", "build", "dist"}
_MOST_FILES, _LONGEST = 3000, 2_000_000
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the root, its tree and its lines."""

    name: str
    tree: ast.Module
    lines: tuple[str, ...]

    def text(self, node: ast.AST) -> str:
        """The first line of a node."""
        return self.lines[getattr(node, "lineno", 1) - 1].strip()[:200]

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, inner ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        """All classes."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]


@dataclass(frozen=True)
class Source:
    """All Python files below a folder; `skipped` are those that could not be parsed."""

    root: Path
    files: tuple[SourceFile, ...]
    skipped: tuple[str, ...]

    def functions(self) -> Iterator[tuple[SourceFile, Function]]:
        """All functions with their file."""
        for file in self.files:
            for function in file.functions:
                yield file, function

    def calls(self, name: str) -> Iterator[tuple[SourceFile, ast.Call]]:
        """All calls whose last name matches the pattern `name` whole."""
        for file in self.files:
            for node in ast.walk(file.tree):
                if isinstance(node, ast.Call) and re.fullmatch(name, called(node)):
                    yield file, node

    @cached_property
    def helpers_of(self) -> dict[object, set[str]]:
        """What `helpers` has found."""
        return {}

    @cached_property
    def encodes_latents(self) -> bool:
        """Whether images are encoded by an autoencoder, so that the diffusion sees latents."""
        return any(True for _ in self.calls("encode|encode_first_stage")) and any(
            True for _ in self.calls("decode|decode_first_stage")
        )


def read_source(root: Path) -> Source:
    """Parse all .py files below a folder; folders of installed packages are passed over.

    Raises:
        BadInput: no such folder, or no Python file in it.
    """
    if not root.is_dir():
        raise BadInput(f"--source {root}: expected a folder with Python files, there is no such folder")
    files, skipped = [], []
    for path in sorted(root.rglob("*.py"))[:_MOST_FILES]:
        if _SKIPPED & set(path.relative_to(root).parts) or path.stat().st_size > _LONGEST:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        name = str(path.relative_to(root))
        try:
            files.append(SourceFile(name, ast.parse(text), tuple(text.splitlines())))
        except (SyntaxError, ValueError):
            skipped.append(name)
    if not files:
        raise BadInput(f"--source {root}: expected Python files, found none that can be parsed")
    return Source(root, tuple(files), tuple(skipped))


def called(node: ast.Call) -> str:
    """The last name of what is called: `loss` for `self.loss(...)`, "" for others."""
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def constant(node: ast.AST) -> float | None:
    """The value of a number, signs included."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = constant(node.operand)
        return -inner if inner is not None else None
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    return None


def _split(node: ast.AST, op: type[ast.operator]) -> tuple[ast.AST, ast.AST] | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, op):
        return node.left, node.right
    return None


def _times(node: ast.AST, value: float) -> ast.AST | None:
    """x of `x * value`, `value * x` or `x / (1 / value)`."""
    if pair := _split(node, ast.Mult):
        for x, factor in (pair, pair[::-1]):
            if constant(factor) == value:
                return x
    if (pair := _split(node, ast.Div)) and constant(pair[1]) == 1 / value:
        return pair[0]
    return None


def _plus(node: ast.AST, value: float) -> ast.AST | None:
    """x of `x + value`, `value + x` or `x - (-value)`."""
    if pair := _split(node, ast.Add):
        for x, addend in (pair, pair[::-1]):
            if constant(addend) == value:
                return x
    if (pair := _split(node, ast.Sub)) and constant(pair[1]) == -value:
        return pair[0]
    return None


def to_symmetric(node: ast.AST) -> ast.AST | None:
    """x of `2 * x - 1` and `(x - 0.5) * 2`: [0, 1] to [-1, 1]."""
    if (inner := _plus(node, -1.0)) is not None and (x := _times(inner, 2.0)) is not None:
        return x
    if (inner := _times(node, 2.0)) is not None and (x := _plus(inner, -0.5)) is not None:
        return x
    return None


def from_symmetric(node: ast.AST) -> ast.AST | None:
    """x of `x * 0.5 + 0.5` and `(x + 1) / 2`: [-1, 1] to [0, 1]."""
    if (inner := _plus(node, 0.5)) is not None and (x := _times(inner, 0.5)) is not None:
        return x
    if (inner := _times(node, 0.5)) is not None and (x := _plus(inner, 1.0)) is not None:
        return x
    return None


def helpers(source: Source, shape: object) -> set[str]:
    """Names of functions that return nothing but `shape` (to_symmetric or from_symmetric) of their argument.

    Found once a source: every function asks, and a package has thousands.
    """
    if shape not in source.helpers_of:
        source.helpers_of[shape] = _helpers(source, shape)
    return source.helpers_of[shape]


def _helpers(source: Source, shape: object) -> set[str]:
    found = set()
    for _, function in source.functions():
        returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
        if len(returns) == 1 and shape(returns[0]) is not None and len(function.body) <= 2:  # type: ignore[operator]
            found.add(function.name)
    return found


def applications(source: Source, function: Function, shape: object) -> list[tuple[ast.AST, ast.AST]]:
    """(node, argument) where `shape` is applied within a function, written out or by a helper of the source."""
    known = helpers(source, shape)
    found: list[tuple[ast.AST, ast.AST]] = []
    if function.name in known:
        return found
    for node in ast.walk(function):
        argument = shape(node)  # type: ignore[operator]
        if argument is None and isinstance(node, ast.Call) and called(node) in known and node.args:
            argument = node.args[0]
        if argument is None or has_call(argument, "len|range|int|size|numel"):  # 2 n - 1 of a count
            continue
        if not (isinstance(argument, ast.Name) and argument.id in _numbers(function)):  # 2 p - 1 of a probability
            found.append((node, argument))
    return found


def _numbers(function: Function) -> set[str]:
    """Parameters that are said to be single numbers."""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {p.arg for p in parameters if isinstance(p.annotation, ast.Name) and p.annotation.id in ("int", "float")}


def names_in(node: ast.AST) -> set[str]:
    """All plain names that are read within a node."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def has_call(node: ast.AST, pattern: str) -> bool:
    """Whether a call's last name matches `pattern` whole, anywhere within a node."""
    return any(isinstance(n, ast.Call) and re.fullmatch(pattern, called(n)) for n in ast.walk(node))
