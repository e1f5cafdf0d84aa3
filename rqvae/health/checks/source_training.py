"""What the source of a training program shows: hidden NaN, splits, schedules, config keys that nothing reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rqvae.health.finding import Evidence, Found, check, stated
from rqvae.health.settings import Setting
from rqvae.health.source import Function, Source, SourceFile, called, has_call, names_in
from rqvae.health.subject import Subject

_POWER = "every Python file of the source was parsed"
_NO_LOSS = r"nan_to_num_?|where|minimum|maximum|clamp|clip|stack|cat|print|append|add_image"
"""Calls of two arguments and more that compare nothing as a loss does."""


def _source(subject: Subject) -> Source:
    assert subject.source is not None
    return subject.source


def _where(file: SourceFile, node: ast.AST) -> Evidence:
    return Evidence(file.text(node), getattr(node, "lineno", 1), file.name)


@check(
    "NUM.NAN_MASKED",
    "NaN is hidden before the loss",
    "major",
    needs=("source",),
    threshold="nan_to_num (not of a gradient) whose result goes into a call with two arguments or more or a "
    "difference, or a mean "
    "that passes over NaN, within one function",
    alternatives=("a metric, not the loss",),
    recommendation=(
        "take nan_to_num out: a NaN in the prediction has to stop the step",
        "or count what is replaced, and log it",
    ),
    verify="a NaN that is put into the weights makes the loss NaN",
    source="EDM2 replaces NaN in gradients only, on purpose",
)
def nan_masked(subject: Subject) -> Iterator[Found]:
    """nan_to_num on what a loss compares."""
    for file, function in _source(subject).functions():
        hidden, first = _hidden_names(function)
        if first is not None and _compared(function, hidden):
            yield Found(
                "NaN in the prediction is replaced before the loss: a broken network looks healthy",
                (_where(file, first),),
                confidence=0.9,
                power=_POWER,
            )
            return


def _hidden_names(function: Function) -> tuple[set[str], ast.AST | None]:
    """Names that hold a result of nan_to_num, and the first such call; those of gradients do not count."""
    names: set[str] = set()
    first: ast.AST | None = None
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and called(node) in ("nan_to_num", "nan_to_num_", "nanmean", "nansum"):
            if "'grad'" in ast.dump(node) or _to_infinity(node):
                continue
            first = first or node
            names |= names_in(node) if called(node).endswith("_") or called(node).startswith("nanm") else set()
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and called(node.value) == "nan_to_num":
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names, first


def _to_infinity(call: ast.Call) -> bool:
    """Whether NaN becomes infinity (`x.nan_to_num(torch.inf)`, `torch.nan_to_num(x, nan=inf)`)."""
    function = call.func
    of_tensor = isinstance(function, ast.Attribute) and not (
        isinstance(function.value, ast.Name) and function.value.id in ("torch", "np", "numpy", "jnp")
    )
    values = [*call.args[0 if of_tensor else 1 :][:1], *(word.value for word in call.keywords if word.arg == "nan")]
    return any(isinstance(value, ast.Attribute) and value.attr == "inf" for value in values)


def _compared(function: Function, names: set[str]) -> bool:
    """Whether one of the names is compared with another value: a call of two arguments, or a difference."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and called(node) in ("nanmean", "nansum"):
            return True
        if isinstance(node, ast.Call) and len(node.args) >= 2 and not re.fullmatch(_NO_LOSS, called(node)):
            direct = any(
                isinstance(a, ast.Call) and called(a) == "nan_to_num" and not _to_infinity(a) for a in node.args
            )
            if direct or any(isinstance(a, ast.Name) and a.id in names for a in node.args):
                return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and names_in(node) & names:
            return True
    return False


@check(
    "DATA.LEAK",
    "the same image in training and test",
    "major",
    needs=("source",),
    threshold="an item is appended to the list of each of its labels, and the split into training and test "
    "is made within a loop over "
    "these lists",
    alternatives=("items that have one label each",),
    recommendation=("split items (better: slides or patients) first, then build the lists",),
    verify="the intersection of the two sets is empty",
)
def leak(subject: Subject) -> Iterator[Found]:
    """Split by class list of items with several labels."""
    lists = split = None
    for file, function in _source(subject).functions():
        for node in ast.walk(function):
            if not isinstance(node, ast.For):
                continue
            if split is None and (call := _splits(node)) is not None:
                split = (file, call)
            if lists is None and (call := _appends_by_label(node)) is not None:
                lists = (file, call)
    if lists and split:
        yield Found(
            "images with several labels stand in several lists, and each list is split by itself: "
            "test images are trained on",
            (_where(*split), _where(*lists)),
            confidence=0.85,
            power=_POWER,
        )


def _splits(loop: ast.For) -> ast.AST | None:
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and re.fullmatch(r"train_test_split|random_split", called(node)):
            return node
    return None


def _appends_by_label(loop: ast.For) -> ast.AST | None:
    """`for label in ...: lists[label].append(item)` where the item does not depend on the label."""
    label = names_in(loop.target)
    for node in ast.walk(loop):
        is_append = isinstance(node, ast.Call) and called(node) == "append" and isinstance(node.func, ast.Attribute)
        if is_append and isinstance(node.func.value, ast.Subscript):  # type: ignore[attr-defined]
            item = set().union(*(names_in(a) for a in node.args)) if node.args else set()  # type: ignore[attr-defined]
            if names_in(node.func.value.slice) & label and item and not item & label:  # type: ignore[attr-defined]
                return node
    return None


@check(
    "OPT.SCHEDULE_RESUME_NEW",
    "a resumed run gets a new schedule",
    "major",
    needs=("source",),
    threshold="a scheduler is made in a function that loads a state, with a length that is a difference "
    "(the steps that remain)",
    recommendation=("load the scheduler's state, and make it with the total number of steps",),
    verify="the learning rate is continuous over a resume",
)
def resume_new(subject: Subject) -> Iterator[Found]:
    """A schedule over the remaining steps."""
    for file, function in _source(subject).functions():
        if not has_call(function, "load_state_dict"):
            continue
        rest = {
            target.id
            for n in ast.walk(function)
            if isinstance(n, ast.Assign) and isinstance(n.value, ast.BinOp) and isinstance(n.value.op, ast.Sub)
            for target in n.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and re.search(r"LR$|_schedule(r)?(_with_\w+)?$", called(node)):
                values = [*node.args[1:], *(k.value for k in node.keywords)]
                short = any(
                    names_in(v) & rest or (isinstance(v, ast.BinOp) and isinstance(v.op, ast.Sub)) for v in values
                )
                if short:
                    yield Found(
                        "after a resume the schedule begins anew, over the steps that remain",
                        (_where(file, node),),
                        confidence=0.85,
                        power=_POWER,
                    )
                    return


@check(
    "LOG.LR_READ_WRONG",
    "the learning rate is read with get_lr",
    "info",
    needs=("source",),
    threshold="`get_lr()` is called on a scheduler outside of a scheduler class",
    recommendation=("read get_last_lr() or optimizer.param_groups[0]['lr']",),
    verify="the logged rate is the one that the step used",
    source="torch.optim.lr_scheduler: get_lr warns that get_last_lr is meant",
)
def get_lr(subject: Subject) -> Iterator[Found]:
    """get_lr from outside."""
    for file, call in _source(subject).calls("get_lr"):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        if isinstance(owner, ast.Attribute) or (isinstance(owner, ast.Name) and owner.id != "self"):
            yield Found(
                "get_lr() is called from outside the scheduler", (_where(file, call),), confidence=0.9, power=_POWER
            )
            return


class _Reads:
    """Which names a source reads, and where a value goes."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.attributes: dict[str, int] = {}
        self.strings: set[str] = set()
        self.parameters: dict[tuple[str, str], bool] = {}
        self.passed: dict[str, list[tuple[str, str]]] = {}
        self.reads: dict[str, int] = {}
        self._callables: dict[str, list[Function]] = {}
        for file in source.files:
            self._collect(file)

    def _collect(self, file: SourceFile) -> None:
        for owner in file.classes:
            for item in owner.body:
                if isinstance(item, Function) and item.name == "__init__":
                    self._callables.setdefault(owner.name, []).append(item)
        for function in file.functions:
            self._callables.setdefault(function.name, []).append(function)
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.attributes[node.attr] = self.attributes.get(node.attr, 0) + 1
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                self.strings.add(str(node.slice.value))
            elif isinstance(node, ast.Call):
                self._call(node)

    def _call(self, node: ast.Call) -> None:
        if called(node) in ("get", "getattr", "pop") and node.args:
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant):
                    self.strings.add(str(argument.value))
        for keyword in node.keywords:
            if keyword.arg and isinstance(keyword.value, ast.Attribute):
                self.passed.setdefault(keyword.value.attr, []).append((called(node), keyword.arg))

    def parameter_is_read(self, callee: str, name: str) -> bool:
        """Whether a parameter does anything; True for what is not in the source."""
        functions = self._callables.get(callee)
        if not functions:
            return True
        return any(self._used(function, name) for function in functions)

    def _used(self, function: Function, name: str) -> bool:
        declared = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        if name not in declared:
            return function.args.kwarg is not None
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                stored = self._only_stored(function, node)
                if stored is None or self.attributes.get(stored, 0) > 0:
                    return True
        return False

    @staticmethod
    def _only_stored(function: Function, node: ast.Name) -> str | None:
        """The attribute of `self.x = name`, None for any other use."""
        for statement in ast.walk(function):
            if isinstance(statement, ast.Assign) and statement.value is node:
                target = statement.targets[0]
                return target.attr if isinstance(target, ast.Attribute) else None
        return None

    def key_is_read(self, key: str) -> bool:
        """Whether a config key is read, and what it is passed to does something with it."""
        if key in self.strings:
            return True
        passed = self.passed.get(key, [])
        if self.attributes.get(key, 0) > len(passed):
            return True
        return any(self.parameter_is_read(callee, name) for callee, name in passed)


def dead_keys(config: tuple[Setting, ...], source: Source) -> list[Setting]:
    """Config keys that the source does not read, or passes on to a parameter that is never read.

    A source that unpacks the config with ** reads every key that is a parameter somewhere.
    """
    reads = _Reads(source)
    unpacked = any(k.arg is None for _, call in source.calls(r".+") for k in call.keywords)
    parameters = {a.arg for _, f in source.functions() for a in (*f.args.args, *f.args.kwonlyargs)}
    dead = []
    for setting in config:
        key = setting.key.rpartition(".")[2]
        if re.fullmatch(r"[A-Za-z_]\w*", key) and not reads.key_is_read(key) and not (unpacked and key in parameters):
            dead.append(setting)
    return dead


@check(
    "LOG.DEAD_KEY",
    "config keys that nothing reads",
    "minor",
    needs=("config", "source"),
    threshold="a key that the source reads nowhere, or only passes on to a parameter that is never used",
    alternatives=("a key that another program reads", "a class path of a config with its own loader"),
    recommendation=("pass the value on, or take the key out of the config",),
    verify="changing the key changes the run",
)
def dead_key(subject: Subject) -> Iterator[Found]:
    """Keys against the source."""
    if any(setting.key.rpartition(".")[2] == "class_path" for setting in subject.config):
        return
    dead = dead_keys(subject.config, _source(subject))
    if dead:
        names = ", ".join(f"{s.key.rpartition('.')[2]}: {s.value}" for s in dead[:6])
        yield Found(
            f"{len(dead)} key(s) have no effect: {names}",
            tuple(stated(s) for s in dead[:6]),
            confidence=0.85,
            power=_POWER,
        )
