"""A lock for file systems that have none: a file that its holder touches, free once it was not touched for long."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from rqvae.errors import BadInput
from rqvae.files import write_whole

log = logging.getLogger(__name__)


class Heartbeat:
    """`.heartbeat` in a run's folder.

    Whoever finds it old writes a name of its own, waits, and has the lock where the name still stands: of several, the
    last one. Times are compared as the file system gives them, so that clocks of hosts need not agree.

    Args:
        folder: of the run.
        beat: seconds between touches.
        stale: seconds without a touch after which the holder counts as dead.
        settle: seconds in which others that found it old at the same moment have written theirs.

    Attributes:
        lost: another process took the place of this one, which had been silent for too long (a suspended machine).
    """

    def __init__(self, folder: Path, beat: float = 10.0, stale: float = 60.0, settle: float = 2.0) -> None:
        self.path = folder / ".heartbeat"
        self._beat, self._stale, self._settle = beat, stale, settle
        self._name = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}"
        self.lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def acquire(self) -> None:
        """Raise BadInput where another process is alive in this folder; else hold it until `release`."""
        age = self._age()
        if age is not None and age < self._stale:
            raise self._taken(f"its last sign of life is {age:.0f} s old, after {self._stale:.0f} s it counts as dead")
        self._write()
        time.sleep(self._settle)
        if not self._mine():
            raise self._taken("it took a dead one's place at the same moment")
        self._thread.start()

    def release(self) -> None:
        """Free it, where it is still ours."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._mine():
            self.path.unlink(missing_ok=True)

    def _taken(self, why: str) -> BadInput:
        return BadInput(f"{self.path.parent}: another run is training in this folder (it holds {self.path}; {why})")

    def _write(self) -> None:
        write_whole(self.path, self._name)

    def _mine(self) -> bool:
        try:
            return self.path.read_text() == self._name
        except FileNotFoundError:
            return False

    def _age(self) -> float | None:
        """Seconds since the last touch by the file system's own clock; None where there is no file."""
        probe = self.path.with_name(f".heartbeat.{uuid.uuid4().hex}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink()

    def _keep_beating(self) -> None:
        while not self._over.wait(self._beat):
            try:
                if not self._mine():
                    self.lost = True
                    return
                os.utime(self.path)
            except OSError as error:
                log.warning("%s: no sign of life could be left: %s", self.path, error)
