"""The part of a run that deals with the operating system: the folder's lock and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from rqvae.backends import Backend
from rqvae.errors import RunFailed
from rqvae.processes import stop_signals
from rqvae.trainers.run_folder import RunLock

log = logging.getLogger(__name__)
Wish = Literal["checkpoint", "stop"]
_WISHES: tuple[Wish | None, ...] = (None, "checkpoint", "stop")
"""The later ones take precedence."""


class Session:
    """Holds the lock and catches SIGTERM and SIGINT while a run trains.

    A signal only sets a flag. The ranks agree on it: SIGTERM may reach one host, and all must save the same step.

    Args:
        folder: the run's folder.
        lock: held by rank 0; None on other ranks.
        check_seconds: how often the ranks agree.

    Attributes:
        signal: number of the one that all ranks stop for; 0 before they have agreed on it.
    """

    def __init__(self, folder: Path, lock: RunLock | None, check_seconds: float) -> None:
        self.folder, self._lock, self._every = folder, lock, check_seconds
        self.signal = 0
        self._received = 0
        self.granted: Wish | None = None
        self._asked: dict[Wish, str] = {}
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
        self._received = self._received or number

    def ask(self, what: Wish, why: str) -> None:
        """What the ranks are to do when they have agreed on it; the first reason stays."""
        self._asked.setdefault(what, why)

    def fulfil(self) -> str:
        """Forget the wish that was granted; its reason, "" on ranks that did not ask."""
        assert self.granted is not None
        why, self.granted = self._asked.pop(self.granted, ""), None
        return why

    def stopping(self, backend: Backend) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank.

        With several ranks the flag is reduced once in so many steps, a number that rank 0 measures and all share,
        such that it happens every `check_seconds`.

        Raises:
            RunFailed: the folder's lock is another process's by now.
        """
        if self._lock and self._lock.lost:
            raise RunFailed(f"{self.folder}: another process trains in this folder since this one was silent for long")
        wish = max((_WISHES.index(what) for what in self._asked), default=0)
        if backend.world_size == 1:
            self.granted, self.signal = _WISHES[wish], self._received
            return bool(self.signal)
        if self._steps < self._next_check:
            self._steps += 1
            return False
        seconds = max(1e-3, time.monotonic() - self._since)
        steps = min(1000.0, max(1.0, self._steps * self._every / seconds))
        # the slowest rank decides on the number of steps: max of (signal, -steps, wish)
        mine = torch.tensor([float(self._received), -steps, float(wish)], device=backend.device)
        votes = backend.all_reduce(mine, "max").tolist()
        self.granted = _WISHES[int(votes[2])]
        self._steps, self._next_check, self._since = 0, max(1, int(-votes[1])), time.monotonic()
        self.signal = int(votes[0])  # one that was received while this waited is in the next vote
        return bool(self.signal)
