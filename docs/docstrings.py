"""What the pages take from signatures and docstrings: arguments with type, default and meaning, as Markdown cells."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import docstring_parser
import yaml

NO_DEFAULT = "*required*"
_ALIASES = {"DurationText": "duration", "MakeTransform": "Callable[[DataSpec], Transform]"}


@dataclass(frozen=True)
class Argument:
    """One key of a config.

    Args:
        name: as it is written in a config.
        kind: its type, Markdown.
        default: what it is where the config does not say, Markdown.
        meaning: the docstring's words, one line of Markdown; empty where there are none.
    """

    name: str
    kind: str
    default: str
    meaning: str


def arguments(cls: Callable[..., Any]) -> list[Argument]:
    """The constructor's (or function's) arguments in their order, without those that the framework gives."""
    described = {p.arg_name: p.description or "" for p in _parsed(cls).params}
    module = vars(sys.modules[cls.__module__])
    rows = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            value = default(_default_of(cls, parameter))
            rows.append(Argument(name, kind(parameter.annotation, module), value, _line(described.get(name, ""))))
    return rows


def summary(item: Any) -> str:
    """The docstring without its sections (Args, Raises, ...), as Markdown paragraphs."""
    parsed = _parsed(item)
    glue = "\n\n" if parsed.blank_after_short_description else "\n"
    paragraphs = f"{parsed.short_description or ''}{glue}{parsed.long_description or ''}".split("\n\n")
    return "\n\n".join(_prose(text) for text in paragraphs if text.strip())


def kind(annotation: Any, module: dict[str, Any]) -> str:
    """A type as its source writes it; the choices of a Literal; `duration` for amounts of training."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    for alias, words in _ALIASES.items():
        text = re.sub(rf"\b{alias}\b", words, text)
    for name in re.findall(r"\b[A-Z]\w+\b", text):
        if typing.get_origin(module.get(name)) is typing.Literal:
            inside = ", ".join(repr(choice) for choice in typing.get_args(module[name]))
            text = re.sub(rf"\b{name}\b", f"Literal[{inside}]", text)
    choices_of = re.fullmatch(r"Literal\[(.*)\]( \| None)?", text)
    if choices_of:
        choices = [choice.strip("\"' ") for choice in choices_of[1].split(",")]
        return ", ".join(f"`{choice}`" for choice in choices) + (", `null`" if choices_of[2] else "")
    made = re.fullmatch(r"Callable\[\[.*?\], ([\w.]+)\]", text)
    if made:
        return f"class of `{made[1]}`"
    # no | inside a table: `float` or `null`
    return " or ".join(f"`{part}`" for part in text.replace("None", "null").replace('"', "").split(" | "))


def default(value: Any) -> str:
    """A default as a config would write it."""
    if value is inspect.Parameter.empty:
        return NO_DEFAULT
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"`{value.__qualname__}`"
    if dataclasses.is_dataclass(value):
        changed = [
            f"{f.name}: {_yaml(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if f.init and getattr(value, f.name) != _field_default(f)
        ]
        return f"`{type(value).__qualname__}`" + (f" with `{', '.join(changed)}`" if changed else "")
    return f"`{_yaml(value)}`"


def anchor(heading: str) -> str:
    """The fragment that Python-Markdown's toc extension gives a heading of plain words."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _parsed(item: Any) -> docstring_parser.Docstring:
    return docstring_parser.parse(inspect.getdoc(item) or "", docstring_parser.DocstringStyle.GOOGLE)


def _default_of(cls: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(cls):
        for f in dataclasses.fields(cls):
            if f.name == parameter.name:
                value = _field_default(f)
                return inspect.Parameter.empty if value is dataclasses.MISSING else value
    return parameter.default


def _field_default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _yaml(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, tuple):
        value = list(value)
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    except yaml.representer.RepresenterError:
        return repr(value)
    return text.removesuffix("...").strip()


def _line(text: str) -> str:
    return _prose(text).replace("|", r"\|")


def _prose(text: str) -> str:
    """One paragraph on one line, with nothing in it that Markdown would read as HTML or emphasis."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = [re.sub(r"([*_])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return "".join(word for pair in itertools.zip_longest(plain, parts[1::2], fillvalue="") for word in pair)
