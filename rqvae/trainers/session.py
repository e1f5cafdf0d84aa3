"""The part of a run that deals with the operating system: the folder's lock and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from types import TracebackType

import torch

from rqvae.backends import Backend
from rqvae.errors import RunFailed
from rqvae.processes import stop_signals
from rqvae.trainers.run_folder import RunLock

log = logging.getLogger(__name__)


class Session:
    """Holds the lock and catches SIGTERM and SIGINT while a run trains.

    A signal only sets a flag. The ranks agree on it: SIGTERM may reach one host, and all must save the same step.

    Args:
        folder: the run's folder.
        lock: held by rank 0; None on other ranks.
        check_seconds: how often the ranks agree.
    """

    def __init__(self, folder: Path, lock: RunLock | None, check_seconds: float) -> None:
        self.folder, self._lock, self._every = folder, lock, check_seconds
        self.signal = 0
        self._stack = contextlib.ExitStack()
        self._steps, self._next_check, self._since = 0, 1, time.monotonic()

    def __enter__(self) -> Session:
        self._stack.enter_context(stop_signals(self._caught))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        if self._lock:
            self._lock.release()

    def _caught(self, number: int) -> None:
        # A second signal changes nothing: it does not interrupt the checkpoint that the first one asked for.
        self.signal = self.signal or number

    def stopping(self, backend: Backend) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank.

        With several ranks the flag is reduced once in so many steps, a number that rank 0 measures and all share,
        such that it happens every `check_seconds`.

        Raises:
            RunFailed: the folder's lock is another process's by now.
        """
        if self._lock and self._lock.lost:
            raise RunFailed(f"{self.folder}: another process trains in this folder since this one was silent for long")
        if backend.world_size == 1:
            return bool(self.signal)
        if self._steps < self._next_check:
            self._steps += 1
            return False
        seconds = max(1e-3, time.monotonic() - self._since)
        wish = min(1000.0, max(1.0, self._steps * self._every / seconds))
        # the slowest rank decides on the number of steps: max of (signal, -wish)
        votes = backend.all_reduce(torch.tensor([float(self.signal), -wish], device=backend.device), "max").tolist()
        self._steps, self._next_check, self._since = 0, max(1, int(-votes[1])), time.monotonic()
        self.signal = int(votes[0])
        return bool(self.signal)
