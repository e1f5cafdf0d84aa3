"""Starts an XLA job: replicas through `torch_xla.launch`, or the one process of SPMD mode."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

from rqvae.backends import xla_environment
from rqvae.backends.hosts import RESTARTS, host_count, max_restarts
from rqvae.errors import BadInput
from rqvae.processes import STOP_SIGNALS, answer_stop_signals

_GRACE = 5.0
"""Seconds that the other replicas have to end by themselves when one has failed; they may be waiting for it."""


def launch(arguments: Sequence[str], world_size: int, *, threads: int = 0) -> int:
    """Run `python -m rqvae ARGUMENTS` on `world_size` devices of this host and wait for it.

    Returns:
        The command's exit code, of the replica that failed first where any did.

    Raises:
        BadInput: torch_xla is not installed; another number than the host's devices, where it has TPUs; several hosts
            without TPUs, or restarts.
    """
    xla_environment.prepare()
    if xla_environment.on_host() and host_count() > 1:
        raise BadInput(f"NNODES: expected 1 with xla on the host's cores (PJRT_DEVICE=CPU), got {host_count()}")
    if max_restarts():
        raise BadInput(f"{RESTARTS}: expected 0 with backend xla, whose scheduler restarts a pod, got {max_restarts()}")
    xla_environment.set_devices(world_size)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or max(1, (os.cpu_count() or 1) // world_size)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {xla_environment.JOB: folder, "RQVAE_ERROR_DIR": folder}
        try:
            run = _one_process if xla_environment.spmd() else _replicas
            code = run(list(arguments), world_size, Path(folder))
        finally:
            for name in (xla_environment.JOB, "RQVAE_ERROR_DIR"):
                del os.environ[name]
        for words in sorted(Path(folder).glob("rank_*"))[:1]:
            sys.stderr.write(f"error: {words.read_text().partition(' ')[2]}\n")
    return code


def _one_process(arguments: list[str], world_size: int, folder: Path) -> int:  # noqa: ARG001  (as `_replicas`)
    process = subprocess.Popen([sys.executable, "-m", "rqvae", *arguments])
    with _passing_signals(lambda: [process.pid]):
        code = process.wait()
    return code if code >= 0 else 3


def _replicas(arguments: list[str], world_size: int, folder: Path) -> int:
    resource_tracker.ensure_running()  # at its start it unblocks both signals, in the thread that it is started from
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # what is started inherits it
    try:
        import torch_xla
        from torch_xla._internal import tpu

        if not xla_environment.on_host() and world_size != tpu.num_available_devices():
            devices = tpu.num_available_devices()
            raise BadInput(f"--world-size: expected {devices} (TPU devices of this host) or 1, got {world_size}")
        with _passing_signals(lambda: [child.pid for child in multiprocessing.active_children() if child.pid]):
            try:
                torch_xla.launch(_replica, args=(arguments,))
            except Exception as error:  # noqa: BLE001  (a replica that left the pool without a word)
                if not (folder / "code").exists():
                    sys.stderr.write(f"error: a replica died: {error}\n")
                    return 3
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = folder / "code"
    return int(code.read_text()) if code.exists() else 0


def _replica(index: int, arguments: list[str]) -> None:  # noqa: ARG001  (torch_xla.launch gives it)
    """One replica: a thread, not the main one, of a process that torch_xla has started."""
    with _STARTING:
        if not any(thread.name == "stop-signals" for thread in threading.enumerate()):
            answer_stop_signals()
    code = importlib.import_module("rqvae.cli").run(arguments)
    if code:
        Path(os.environ[xla_environment.JOB], "code").write_text(str(code))
    if 0 < code < 128:
        threading.Thread(target=_leave, args=(code,), daemon=True).start()


_STARTING = threading.Lock()


def _leave(code: int) -> None:
    time.sleep(_GRACE)
    os._exit(code)


@contextlib.contextmanager
def _passing_signals(children: Callable[[], list[int]]) -> Iterator[None]:
    """Within this context SIGTERM and SIGINT are the children's, not this process's.

    The main thread waits for a child all the while. So a thread hears of a signal by a pipe that the interpreter writes
    its number to, in whichever thread it arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(writing)

    def forward() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        while number := int.from_bytes(os.read(reading, 1), "little"):
            for pid in children() if number in STOP_SIGNALS else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    thread = threading.Thread(target=forward, name="signals-to-children", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)
