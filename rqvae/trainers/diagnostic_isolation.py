"""A diagnosis in a process of its own: compiled code that ends or hangs the process is a row, not the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rqvae.diagnostics.compare import Status
from rqvae.diagnostics.journal import read_lines
from rqvae.errors import RunFailed

_POLL_SECONDS = 0.2
_MOST_DEATHS = 64


def run_isolated(command: Sequence[str], journal: Path, timeout: float) -> int:
    """Run a diagnosis again and again until it ends by itself; returns its exit code.

    A unit in which the process was killed by a signal is CRASHED, one that takes longer than `timeout` is TIMEOUT; both
    are noted in the journal, with which the next process goes on.

    Args:
        command: arguments of `python -m rqvae`.
        journal: what the process writes.
        timeout: seconds that one unit may take, its compilation included.

    Raises:
        RunFailed: the process dies outside a unit, or too often.
    """
    for _ in range(_MOST_DEATHS):
        child = subprocess.Popen([sys.executable, "-m", "rqvae", *command])
        try:
            status = _wait(child, journal, timeout)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if status is None and child.returncode >= 0:
            return child.returncode
        path = _open_unit(journal)
        if path is None:
            raise RunFailed(f"--isolate process: the process ended with {child.returncode} outside a submodule")
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"lost": path, "status": (status or Status.CRASHED).value}) + "\n")
    raise RunFailed(f"--isolate process: the process died {_MOST_DEATHS} times")


def _wait(child: subprocess.Popen[bytes], journal: Path, timeout: float) -> Status | None:
    """Until the process ends; TIMEOUT, and the process killed, where a unit took too long."""
    changed, size = time.monotonic(), -1
    while child.poll() is None:
        time.sleep(_POLL_SECONDS)
        now = journal.stat().st_size if journal.exists() else -1
        if now != size:
            changed, size = time.monotonic(), now
        elif time.monotonic() - changed > timeout and _open_unit(journal) is not None:
            child.kill()
            child.wait()
            return Status.TIMEOUT
    return None


def _open_unit(journal: Path) -> str | None:
    """The unit that was begun last, where nothing came after it."""
    lines = read_lines(journal)
    return lines[-1].get("begin") if lines else None
