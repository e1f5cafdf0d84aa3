"""Starts a job's processes with torchrun's own agent, in this process, so that the exit code stays ours."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def in_job() -> bool:
    """Whether a launcher (ours, torchrun, SLURM with torchrun) started this process as a rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], world_size: int, *, threads: int = 0) -> int:
    """Run `python -m rqvae ARGUMENTS` as `world_size` processes on this host and wait for them.

    A rank leaves the line that says why it failed in a file; the first one's is said here, once.

    Returns:
        0, or the exit code of the rank that failed first; 128 + signal after a signal that ended the job.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or max(1, (os.cpu_count() or 1) // world_size)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        # An explicit endpoint on a free port; a restart through --standalone can meet a stale store.
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RQVAE_ERROR_DIR"] = folder
        try:
            elastic_launch(config, sys.executable)("-m", "rqvae", *arguments)
        except ChildFailedError as error:
            return _report(error, Path(folder))
        except SignalException as stop:
            failed = sorted(Path(folder).iterdir())
            return _say(failed[0]) if failed else 128 + int(stop.sigval)
        finally:
            del os.environ["RQVAE_ERROR_DIR"]
    return 0


def _report(error: ChildFailedError, folder: Path) -> int:
    """Say why the job failed and return the code of the rank that failed first.

    Whose exit was seen first tells little: a rank that gives up closes its connections before it is gone, and the
    others, which wait for it, may be gone earlier. A rank that was killed left no words; else the first words count.
    torchrun reports death by a signal as a negative code.
    """
    killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0]
    words = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    if killed and not (folder / f"rank_{killed[0][0]}").exists():
        rank, failure = killed[0]
        sys.stderr.write(f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}\n")
        return 3
    return _say(words[0]) if words else max(failure.exitcode for failure in error.failures.values())


def _say(words: Path) -> int:
    """Say what a rank left, `CODE MESSAGE`, and return the code."""
    code, _, message = words.read_text().partition(" ")
    sys.stderr.write(f"error: {message}\n")
    return int(code)
