"""Checkpoints written while training goes on: tensors are copied to the host in the step, a thread writes the files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from torch import Tensor

log = logging.getLogger(__name__)


class BackgroundWriter:
    """One job at a time; the next one waits for it, and raises what it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job, after the one before it has ended well."""
        self.wait()

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  (kept for the thread that trains)
                self._error = error

        # not a daemon: the process does not end in the middle of a checkpoint that could have become good
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the job has ended; raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Until the job has ended, where another error is on its way: its own is only logged."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001
            log.error("%s", error)


def host_copy(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies on the host that share no memory with the originals nor with each other, contiguous as files want them."""
    return {
        name: {key: value.detach().to("cpu", copy=True).contiguous() for key, value in group.items()}
        for name, group in groups.items()
    }
