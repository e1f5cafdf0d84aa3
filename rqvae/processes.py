"""Processes that do not outlive the one that started them. A leaf: every room may import it, it imports none."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LISTENERS: list[Callable[[int], None]] = []


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when its parent dies (Linux, prctl(2)); no-op elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def leave_with_parent(grace: float = 5.0, *, save_first: bool = True) -> None:
    """When this process's parent dies: SIGTERM to itself, so that it can save, and the end `grace` seconds later.

    torchrun gives its workers sessions of their own, so a launcher that is killed does not take them along.

    Args:
        grace: seconds.
        save_first: False for the end at once.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if save_first:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextlib.contextmanager
def stop_signals(listener: Callable[[int], None]) -> Iterator[None]:
    """Within this context SIGTERM and SIGINT call `listener` with their number, and do nothing else.

    Python gives signals to the main thread alone; in another one they come by way of `answer_stop_signals`.
    """
    if threading.current_thread() is not threading.main_thread():
        _LISTENERS.append(listener)
        try:
            yield
        finally:
            _LISTENERS.remove(listener)
        return
    before = {number: signal.signal(number, lambda n, _: listener(n)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer_stop_signals() -> None:
    """Have a thread take SIGTERM and SIGINT for a process whose main thread is not ours.

    The process was started with both blocked, as its parent's thread had them.
    They go to every listener of `stop_signals`; where there is none, they end the process as they would have.
    """

    def answer() -> None:
        while True:
            number = int(signal.sigwait(STOP_SIGNALS))
            for listener in list(_LISTENERS):
                listener(number)
            if not _LISTENERS:
                os._exit(128 + number)

    threading.Thread(target=answer, name="stop-signals", daemon=True).start()


_ENDING = {"teardown": True}


def skip_teardown() -> None:
    """Have `end` leave out the teardown of the interpreter.

    For processes with threads of a library that outlive it: one of gloo that has a tensor of Python's to free when the
    interpreter goes is ended by it, and with it the process ("terminate called without an active exception", SIGABRT,
    after all work was done: two of some fifty ranks on a busy machine).
    """
    _ENDING["teardown"] = False


def end(code: int) -> NoReturn:
    """Leave the process with this code; threads are waited for and exit handlers run in any case."""
    if _ENDING["teardown"]:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # the interpreter's own first two steps
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
