"""What a part must look like to be plugged in; what does not is said in one line that names its config key.

Python would find most of these mistakes by itself, but late and in words about our code: a constructor that takes a
flag where we give a `DataSpec` works, and is wrong; a prediction of another shape is broadcast. A leaf: every room may
import it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rqvae.errors import BadInput

FACTORIES: dict[str, tuple[str, ...]] = {
    "data.dataset": ("split",),
    "data.train_transform": ("spec",),
    "data.val_transform": ("spec",),
    "data.test_transform": ("spec",),
    "stage2": ("latent_shape", "data_spec"),
    "stage2.init_args.backbone": ("latent_shape", "data_spec"),
}
"""Keys whose class we make ourselves, and the names of the arguments that we give, first in its constructor."""


def check_factories(config: Mapping[str, Any], source: str) -> None:
    """That the classes at `FACTORIES`' keys begin with the arguments that are given to them.

    A class that cannot be imported is left to the config's parser, which says so with its key.

    Args:
        config: sections as in a file.
        source: file to name.

    Raises:
        BadInput: another constructor. A name with a leading underscore, for an argument without use, is the same name.
    """
    for key, names in FACTORIES.items():
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        path = node.get("class_path") if isinstance(node, Mapping) else node
        made = _imported(path) if isinstance(path, str) else None
        if not inspect.isclass(made):
            continue
        own = [name.lstrip("_") for name, p in inspect.signature(made).parameters.items() if p.kind in _POSITIONAL]
        if tuple(own[: len(names)]) != names:
            got = f"{made.__name__}({', '.join(inspect.signature(made).parameters)})"
            raise BadInput(f"{source}: {key}: expected {made.__name__}({', '.join(names)}, ...), got {got}")


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def check_function(function: Callable[..., Any], key: str, *names: str) -> None:
    """That `function` can be called with as many positional arguments as there are names.

    Raises:
        BadInput: it cannot; names the function by its import path.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled functions may have none: nothing to compare
        return
    except TypeError:
        raise BadInput(f"{key}: expected a function ({', '.join(names)}), got {type(function).__name__}") from None
    try:
        signature.bind(*names)
    except TypeError:
        path = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
        got = f"({', '.join(signature.parameters)})"
        raise BadInput(f"{key}: expected a function ({', '.join(names)}), got {path}{got}") from None


def check_methods(part: object, base: type, key: str) -> None:
    """That every public method of the interface `base` can be called on `part` as the interface says.

    Raises:
        BadInput: names the first method that cannot.
    """
    for name, method in vars(base).items():
        if not inspect.isfunction(method) or (name.startswith("_") and name not in ("__call__", "__getitem__")):
            continue
        _, *wanted = inspect.signature(method).parameters.values()
        positional = [p.name for p in wanted if p.kind in _POSITIONAL]
        named = {p.name: None for p in wanted if p.kind is inspect.Parameter.KEYWORD_ONLY}
        own = inspect.signature(getattr(part, name))
        try:
            own.bind(*positional, **named)
        except TypeError:
            kind = f"{type(part).__name__}.{name}"
            got = f"({', '.join(own.parameters)})"
            raise BadInput(f"{key}: expected {kind}({', '.join((*positional, *named))}), got {got}") from None


def check_type(value: object, kind: type, key: str) -> None:
    """That `value` is a `kind`; BadInput otherwise."""
    if not isinstance(value, kind):
        raise BadInput(f"{key}: expected {kind.__name__}, got {type(value).__name__}")


def describe(value: object) -> str:
    """What came: the type, of a tuple those of its items."""
    return f"({', '.join(map(describe, value))})" if isinstance(value, tuple) else type(value).__name__


def check_shape(value: object, shape: tuple[int, ...], key: str) -> None:
    """That `value` is a tensor of this shape; BadInput otherwise. Reads no number from the device."""
    if not isinstance(value, Tensor):
        raise BadInput(f"{key}: expected a tensor {tuple(shape)}, got {type(value).__name__}")
    if value.shape != tuple(shape):
        raise BadInput(f"{key}: expected {tuple(shape)}, got {tuple(value.shape)}")
