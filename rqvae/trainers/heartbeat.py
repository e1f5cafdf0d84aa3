"""A lock for places that have none: a file or an object that its holder touches, free once that stopped for long."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from rqvae import remote
from rqvae.errors import BadInput, RunFailed
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
        self.path: Path | str = folder / ".heartbeat"
        self._file = folder / ".heartbeat"
        self._beat, self._stale, self._settle = beat, stale, settle
        self._name = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}"
        self.lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def acquire(self) -> None:
        """Raise BadInput where another process is alive in this folder; else hold it until `release`."""
        age = self._age()
        if age is not None and age < self._stale and not self._left_behind():
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
            self._remove()

    def _taken(self, why: str) -> BadInput:
        place = str(self.path).rpartition("/")[0]
        return BadInput(f"{place}: another run is training in this folder (it holds {self.path}; {why})")

    def _left_behind(self) -> bool:
        """Whether its holder is known to be dead, though its last sign of life is young."""
        return False

    def _write(self) -> None:
        write_whole(self._file, self._name)

    def _touch(self) -> None:
        os.utime(self._file)

    def _remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def _mine(self) -> bool:
        try:
            return self._file.read_text() == self._name
        except FileNotFoundError:
            return False

    def _age(self) -> float | None:
        """Seconds since the last touch by the file system's own clock; None where there is no file."""
        probe = self._file.with_name(f".heartbeat.{uuid.uuid4().hex}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self._file.stat().st_mtime
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
                self._touch()
            except (OSError, BadInput, RunFailed) as error:
                log.warning("%s: no sign of life could be left: %s", self.path, error)


class RemoteHeartbeat(Heartbeat):
    """The same as an object at the URL of a run, which other machines see.

    The process holds the lock of the run's copy on this machine before: a name that this machine left there belongs to
    a process that died, and is not waited for.

    Args:
        url: of the run.
    """

    def __init__(self, url: str, beat: float = 10.0, stale: float = 60.0, settle: float = 2.0) -> None:
        super().__init__(remote.folder_of(url), beat, stale, settle)
        self._store = remote.Store(url)
        self.path = f"{self._store.url}/.heartbeat"
        self._machine = _this_machine()
        self._name = f"{self._machine} {self._name}"

    def _left_behind(self) -> bool:
        return (self._store.read(".heartbeat") or b"").decode().startswith(f"{self._machine} ")

    def _write(self) -> None:
        self._store.write(".heartbeat", self._name.encode())

    def _touch(self) -> None:
        self._write()

    def _remove(self) -> None:
        self._store.remove([".heartbeat"])

    def _mine(self) -> bool:
        return self._store.read(".heartbeat") == self._name.encode()

    def _age(self) -> float | None:
        probe = f".heartbeat.{uuid.uuid4().hex}"
        self._store.write(probe, b"")
        try:
            return self._store.age(".heartbeat", than=probe)
        finally:
            self._store.remove([probe])


def _this_machine() -> str:
    """A name that all who share this machine's copies of runs share, and nobody else."""
    file = remote.copies() / ".machine"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, uuid.uuid4().hex)
    return file.read_text()
