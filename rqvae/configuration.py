"""From YAML files and command-line overrides to a typed run; every mistake becomes one line with its file and key."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import logging
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rqvae.contracts import check_factories
from rqvae.errors import BadInput
from rqvae.randomness import seeded
from rqvae.run import AnyRun, Stage1Run, Stage2Run
from rqvae.spellings import spelled_out

log = logging.getLogger(__name__)
T = TypeVar("T")
INFERENCE_SECTIONS = ("data", "stage1", "stage1_checkpoint", "connector", "stage2")


@dataclass(frozen=True)
class Configuration:
    """A checked config.

    Args:
        schema: Stage1Run or Stage2Run.
        parsed: jsonargparse's namespace.
        resolved: every key with its value, as written to config.yaml.
        texts: the files' own content, to name the one that sets a key.
        overrides: the command line's part.
    """

    schema: type[Stage1Run] | type[Stage2Run]
    parsed: Namespace
    resolved: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    overrides: tuple[str, ...] = ()

    @property
    def stage(self) -> int:
        """1 or 2."""
        return self.schema.stage

    def instantiate(self, device: str | None = None) -> AnyRun:
        """Make the objects that the config names; models get their start weights from the run's seed.

        Args:
            device: `meta` makes models without memory, to look at shapes.
        """
        parser = _parser(self.schema)
        try:
            with seeded(self.resolved["train"]["seed"], "weights"), torch.device(device or "cpu"):
                return self.schema(**vars(parser.instantiate(self.parsed)))
        except (ValueError, TypeError, ArgumentError) as error:
            message = _one_line(str(error))
            key, colon, rest = message.partition(":")
            key = self._whole_key(key, rest) if colon else key
            raise BadInput(f"{self._source(key)}: {key}{colon}{rest}") from error

    def for_checks(self) -> AnyRun:
        """The objects on `meta`, without memory; of foreign classes that need numbers to be made, on the host."""
        try:
            return self.instantiate("meta")
        except RuntimeError as error:  # one of another cause comes again
            log.info("made on the host, as meta tensors do not do for it: %s", error)
            return self.instantiate()

    def _whole_key(self, name: str, message: str) -> str:
        """`updates.autoencoder.lr` for `lr`, where one key of the config ends so and has the value that is told."""
        keys = _values(self.resolved)
        found = [key for key, value in keys.items() if key.endswith(f".{name}") and str(value) in message]
        return found[0] if len(found) == 1 and name not in keys else name

    def _source(self, key: str) -> str:
        """The command line, or the last file that sets `key`, or all files."""
        if any(word.partition("=")[0] == f"--{key.replace('.init_args', '')}" for word in self.overrides):
            return "command line"
        if any(word.partition("=")[0] == f"--{key}" for word in self.overrides):
            return "command line"
        for file, text in reversed(self.texts.items()):
            node: Any = text
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if node is not None:
                return file
        return ", ".join(self.texts)


def read(files: Sequence[str | Path], overrides: Sequence[str] = (), *, inference: bool = False) -> Configuration:
    """Read, merge and check config files.

    Args:
        files: YAML files; later ones are merged deeply over earlier ones.
        overrides: `--train.steps 20` and the like.
        inference: keep only the sections that define dataset and model; others are ignored.

    Raises:
        BadInput: one line, `FILE: key: what was expected, what came; did you mean ...`.
    """
    if not files:
        raise BadInput("CONFIG: expected at least one YAML file, got none")
    texts = {str(file): _load(str(file)) for file in files}
    if inference:
        texts = {f: {k: v for k, v in text.items() if k in INFERENCE_SECTIONS} for f, text in texts.items()}
    texts, overrides = spelled_out(texts, overrides)
    schema = Stage2Run if any("stage2" in text for text in texts.values()) else Stage1Run
    try:
        for file, text in texts.items():
            check_factories(text, file)
        parsed = _parse(schema, list(texts.values()), overrides)
        resolved = yaml.safe_load(_parser(schema).dump(parsed, skip_unset=False))
        check_factories(resolved, "command line")
    except ArgumentError as error:
        raise BadInput(_explain(schema, texts, str(error))) from error
    except Exception as error:
        if (place := _import_failed_at(error)) is None:
            raise
        raise BadInput(f"{', '.join(texts)}: {place}: {type(error).__name__}: {_one_line(str(error))}") from error
    return Configuration(schema, parsed, resolved, texts, tuple(overrides))


def build(schema: type[T], values: dict[str, Any], where: str) -> T:
    """An object of any dataclass from plain values, checked as a config is.

    Args:
        schema: the dataclass, for example of an exported model's parts.
        values: `class_path` and `init_args` of its fields.
        where: the file, for errors.

    Raises:
        BadInput: one line, `FILE: key: what was expected, what came`.
    """
    try:
        parsed = _parse(schema, [values], [])
    except ArgumentError as error:
        raise BadInput(_explain(schema, {where: values}, str(error))) from error
    try:
        return schema(**vars(_parser(schema).instantiate(parsed)))
    except (ValueError, TypeError, ArgumentError) as error:
        raise BadInput(f"{where}: {_one_line(str(error))}") from error


def _import_failed_at(error: BaseException) -> str | None:
    """FILE:LINE of the foreign module that raised `error` while it was imported; None for any other error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent)
    at = [f"{f.filename}:{f.lineno}" for f in frames if f.name == "<module>" and not f.filename.startswith((own, "<"))]
    return at[-1] if at else None


def _load(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except FileNotFoundError:
        raise BadInput(f"{file}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        raise BadInput(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file}: expected a mapping of sections (data, stage1, ...), got {type(content).__name__}")
    return content


def _values(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key with its sections, `a.b.c`, and its value."""
    rows: dict[str, Any] = {}
    for key, value in config.items():
        rows |= _values(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def _parser(schema: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(schema, None, sub_configs=False)
    parser.add_argument("--config", action="config")
    return parser


def _parse(schema: type, texts: Sequence[dict[str, Any]], overrides: Sequence[str]) -> Namespace:
    configs = [item for text in texts for item in ("--config", yaml.safe_dump(text))]
    parsed = _parser(schema).parse_args([*configs, *overrides])
    del parsed["config"]
    return parsed


def _explain(schema: type, texts: dict[str, dict[str, Any]], message: str) -> str:
    """One line with the file that brings the error: the shortest list of files that fails in the same words."""
    source, files = "command line", list(texts)
    for k in range(1, len(files) + 1):
        try:
            _parse(schema, [texts[f] for f in files[:k]], [])
        except ArgumentError as error:
            if str(error) == message:
                source = files[k - 1]
                break
    return f"{source}: {_one_line(message)}{_names_near(schema, message)}"


def _one_line(message: str) -> str:
    """jsonargparse's message without its stack of types: the key, and the innermost reason."""
    text = " ".join(message.split())
    text = re.sub(r"^Parser key \"([\w.\[\]]+)\":? ?", r"\1: ", text)
    text = re.sub(r"Problem with given class_path '([\w.]+)': ", r"\1: ", text)
    if union := re.search(r"not validate against any of the Union.*? Errors: - (?:[\w.]+: )?(.*?) - Expected", text):
        text = text[: union.start()] + union[1]
    text = re.sub(r"Type \S.*? expects a function or a callable class: ", "", text)
    text = re.sub(r"\.? Got value: Namespace.*", "", text)
    text = re.sub(r"Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"typing\.Literal|<class '(\w+)'>", lambda m: m[1] or "one of ", text)
    return text.replace("Expected a ", "expected ").strip()[:600]


def _names_near(schema: type, message: str) -> str:
    """`; did you mean X?` for a name that is close to a known one, or where modules are looked for."""
    if "No module named" in message:
        return f" (modules are looked for in {Path.cwd()} and on PYTHONPATH)"
    wrong = re.findall(
        r"(?:[Oo]ption|[Kk]ey|argument)s?:? '?\"?(?:--)?([\w.]+?)'?\"?(?= is not|;|:? not|\.?$| )", message
    )
    wrong += re.findall(r"[Uu]nrecognized arguments: --([\w.]+)", message)
    classes = [c for c in map(_find, re.findall(r"'((?:\w+\.)+\w+)'", message)) if inspect.isclass(c)]
    known = {name for c in classes for name in inspect.signature(c.__init__).parameters} or _all_keys(schema)
    for name in wrong:
        if near := difflib.get_close_matches(name.rpartition(".")[2], known, 1):
            return f"; did you mean {near[0]}?"
    if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        near_class = _class_near(f"{absent[1]}.{absent[2]}")
        return f"; did you mean {near_class}?" if near_class else ""
    if missing := re.search(r"class_path[^\w]+((?:\w+\.)+\w+)|Import path (\S+)|'((?:\w+\.)+\w+)'", message):
        path = next(group for group in missing.groups() if group)
        if near_class := _class_near(path):
            return f"; did you mean {near_class}?"
    return ""


def _all_keys(cls: type) -> set[str]:
    """Every key of the schema's dataclasses."""
    keys: set[str] = set()
    for f in dataclasses.fields(cls):
        keys.add(f.name)
        kind = importlib.import_module(cls.__module__).__dict__.get(str(f.type).partition(" |")[0])
        if dataclasses.is_dataclass(kind):
            keys |= _all_keys(kind)  # type: ignore[arg-type]
    return keys


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _class_near(path: str) -> str:
    """The importable class whose name is close to the last part of `path`, in the same module."""
    module, _, name = path.rpartition(".")
    try:
        names = [n for n, v in vars(importlib.import_module(module)).items() if inspect.isclass(v)]
    except (ImportError, ValueError):
        return ""
    near = difflib.get_close_matches(name, names, 1)
    return f"{module}.{near[0]}" if near and near[0] != name else ""
