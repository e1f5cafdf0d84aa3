"""Units compiled once: clones that share weights, calls that say what ran, and switching units in place."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rqvae.backends.compilers import MemoryGauge, settle
from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.compilers import Compiler
from rqvae.diagnostics.ledger import Ledger, Watch
from rqvae.diagnostics.units import Unit

_TRACE_LINES = 20
SLOWER_BY, SLOWER_SECONDS = 1.1, 1e-3
"""Slower: compiled takes more than so many times the eager seconds, and so much longer."""
_MORE_CALLS = 3


def is_slower(run_seconds: float | None, eager_seconds: float) -> bool:
    """Whether compiled code is slower than eager by more than a clock's own scatter."""
    run = run_seconds or 0.0
    return run > SLOWER_BY * eager_seconds and run - eager_seconds > SLOWER_SECONDS


def sharing_clone(module: nn.Module) -> nn.Module:
    """A copy of a module that computes with the same parameter and buffer tensors: 122 clones of the decoder of Stable
    Diffusion XL take 0.7 MB."""
    shared = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def describe_arguments(arguments: Any) -> str:
    """Types and shapes, as in `(float32 (1, 4, 8, 8), None)`."""

    def words(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        return type(leaf).__name__ if leaf is not None else "None"

    return f"({', '.join(map(words, pytree.tree_leaves(arguments, is_leaf=lambda x: x is None)))})"


@dataclass(frozen=True)
class Failure:
    """An exception of a compiled call.

    Args:
        kind: class of the exception.
        message: its text on one line.
        signature: types and shapes of the arguments.
        trace: the last lines of the traceback.
    """

    kind: str
    message: str
    signature: str
    trace: list[str]


@dataclass
class Execution:
    """One compiled call: what it returned or how it failed, and what was compiled and run for it."""

    status: Status
    output: Any = None
    failure: Failure | None = None
    watch: Watch = field(default_factory=Watch)
    compile_seconds: float = 0.0
    run_seconds: float | None = None
    peak_bytes: int | None = None


class CompiledUnit:
    """A unit's clone with its compiled call. Made before hooks are registered: a copy would have them too.

    Args:
        unit: the unit.
        compiler: of the call.
        ledger: where graphs are noted.
        device: of the weights.
        cuts: paths, relative to the unit, in front of which its graph is cut.
    """

    def __init__(
        self, unit: Unit, compiler: Compiler, ledger: Ledger, device: torch.device, cuts: Sequence[str] = ()
    ) -> None:
        self.unit, self.clone, self.ledger, self.device = unit, sharing_clone(unit.module), ledger, device
        self.call: Callable[..., Any] = compiler.compile(self.clone, unit.path, ledger, cuts)
        self._gauge = MemoryGauge(device)

    def run(self, arguments: Any, keywords: Any) -> Execution:
        """Call it; an exception becomes a status, and no run of compiled code is EAGER_FALLBACK.

        Where something was compiled the call is made once more, so that `run_seconds` is of a warm one.
        """
        self._gauge.start()
        with self.ledger.watching() as watch, _quiet():
            started = time.perf_counter()
            try:
                output = self.call(*arguments, **keywords)
                settle(self.device)
            except Exception as error:  # noqa: BLE001  (whatever a compiler raises is its verdict)
                return Execution(
                    _status_of(error, watch), failure=failure_of(error, (arguments, keywords)), watch=watch
                )
            total = time.perf_counter() - started
        if not watch.executed:
            return Execution(Status.EAGER_FALLBACK, output, watch=watch)
        peak = self._gauge.peak()
        seconds, again = watch.seconds, watch.seconds
        if watch.compiled:
            with self.ledger.watching() as warm:
                self.call(*arguments, **keywords)
                settle(self.device)
            again = min(seconds, warm.seconds) if warm.executed else seconds
        return Execution(Status.OK, output, None, watch, max(0.0, total - seconds), again, peak)

    def least_seconds(self, arguments: Any, keywords: Any, eager: float, run: float) -> tuple[float, float]:
        """The least of these eager and compiled seconds and of those of more calls in turn.

        One call each says little on a machine that does other things too.
        """
        for _ in range(_MORE_CALLS):
            started = time.perf_counter()
            self.clone(*arguments, **keywords)
            settle(self.device)
            eager = min(eager, time.perf_counter() - started)
            with self.ledger.watching() as watch, _quiet():
                self.call(*arguments, **keywords)
                settle(self.device)
            run = min(run, watch.seconds) if watch.executed else run
        return eager, run

    def gold(self, arguments: Any, keywords: Any, dtype: torch.dtype) -> Any:
        """The eager output of a copy in a higher precision, on inputs of that precision."""
        wide = copy.deepcopy(self.clone).to(dtype)

        def widen(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        wide_arguments, wide_keywords = pytree.tree_map(widen, (arguments, keywords))
        return wide(*wide_arguments, **wide_keywords)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs pages about a graph that does not compile; here that is a row."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _status_of(error: Exception, watch: Watch) -> Status:
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and runs that compile nothing come by here

    ran = watch.raised or (watch.executed and not isinstance(error, TorchDynamoException))
    return Status.RUNTIME_ERROR if ran else Status.COMPILE_ERROR


def failure_of(error: Exception, arguments: Any) -> Failure:
    """An exception as a row keeps it: of a compiler's wrapped one the innermost, with what the call was given."""
    cause = error
    while isinstance(inner := getattr(cause, "inner_exception", None) or cause.__cause__, Exception):
        cause = inner
    lines = "".join(traceback.format_exception(error)).splitlines()[-_TRACE_LINES:]
    message = " ".join(str(cause).split())[:500]
    return Failure(type(cause).__name__, message, describe_arguments(arguments), lines)


@dataclass
class SwitchedRun:
    """What the compiled code of one unit did in a decode.

    Args:
        unit: the unit.
        calls: of the unit.
        backend_calls: runs of compiled graphs in them; 0 where dynamo was eager without a word.
        fresh_graphs: compiled for them.
        status: COMPILE_ERROR or RUNTIME_ERROR where a call raised.
        failure: its exception.
    """

    unit: Unit
    calls: int = 0
    backend_calls: int = 0
    fresh_graphs: int = 0
    status: Status = Status.OK
    failure: Failure | None = None


def _watched(compiled: CompiledUnit, run: SwitchedRun) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        run.calls += 1
        with compiled.ledger.watching() as watch, _quiet():
            try:
                return compiled.call(*arguments, **keywords)
            except Exception as error:
                run.status, run.failure = _status_of(error, watch), failure_of(error, (arguments, keywords))
                raise
            finally:
                run.backend_calls += len(watch.executed)
                run.fresh_graphs += len(watch.compiled)

    return call


@contextlib.contextmanager
def switched(units: Iterable[CompiledUnit]) -> Iterator[list[SwitchedRun]]:
    """Within, the units' own modules answer calls with their compiled code. Types, hooks and weights stay as they are.

    The slot is that of `nn.Module.compile`: the call of a module looks there first.

    Yields:
        What each unit's compiled code does, filled in as it is called.
    """
    before: list[tuple[nn.Module, Any]] = []
    runs: list[SwitchedRun] = []
    try:
        for compiled in units:
            module = compiled.unit.module
            before.append((module, module._compiled_call_impl))
            runs.append(SwitchedRun(compiled.unit))
            module._compiled_call_impl = _watched(compiled, runs[-1])
        yield runs
    finally:
        for module, call in reversed(before):
            module._compiled_call_impl = call
