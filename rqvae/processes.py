"""Processes that do not outlive the one that started them. A leaf: every room may import it, it imports none."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when its parent dies (Linux, prctl(2)); no-op elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def leave_with_parent(grace: float = 5.0) -> None:
    """When this process's parent dies: SIGTERM to itself, so that it can save, and the end `grace` seconds later.

    torchrun gives its workers sessions of their own, so a launcher that is killed does not take them along.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
