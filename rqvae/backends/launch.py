"""Starts a job's processes with torchrun's own agent, in this process, so that the exit code stays ours.

The same command runs on each of NNODES hosts. They meet at MASTER_ADDR:MASTER_PORT, in a store that host 0 keeps; the
numbers of the ranks are what that meeting (c10d's rendezvous) gives out.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from rqvae.backends.agent import Agent, JobOver, Words
from rqvae.backends.hosts import Hosts
from rqvae.errors import BadInput, RunFailed

log = logging.getLogger(__name__)

JOB_START = "RQVAE_JOB_START"
"""Set in the processes that are started: when their launcher was, in seconds since 1970."""


def in_job() -> bool:
    """Whether a launcher (ours, torchrun, SLURM with torchrun) started this process as a rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], world_size: int, *, threads: int = 0, backend: str = "cpu") -> int:
    """Run `python -m rqvae ARGUMENTS` as `world_size` processes on this host and wait for them.

    With NNODES > 1 they are part of the job of all hosts. A rank leaves the line that says why it failed in a file; the
    first one's is said here, once, on every host. After a death the processes of all hosts start anew, from the newest
    checkpoint, up to RQVAE_MAX_RESTARTS times; a host that was lost joins again by the same command.

    Args:
        arguments: of the command.
        world_size: processes on this host.
        threads: OpenMP threads of a process, 0 for an equal share of the cores.
        backend: its name, which must be the same on all hosts.

    Returns:
        0, or the exit code of the rank that failed first; 128 + signal after a signal that ended the job.

    Raises:
        BadInput: hosts that do not answer or do not fit together.
        RunFailed: hosts that did not come, or did not come back.
    """
    hosts = Hosts.from_environment()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or max(1, (os.cpu_count() or 1) // world_size)))
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RQVAE_ERROR_DIR": folder, JOB_START: str(time.time())}
        try:
            job = _Job(arguments, world_size, backend, Path(folder))
            while (code := job.attempt(hosts)) is None:
                hosts = replace(hosts, restarts=hosts.restarts - 1)
        finally:
            for name in ("RQVAE_ERROR_DIR", JOB_START):
                del os.environ[name]
    return code


@dataclass(frozen=True)
class _Job:
    """What is started on this host.

    Args:
        arguments: of the command.
        world_size: processes on this host.
        backend: its name.
        words: folder in which a rank leaves its last words.
    """

    arguments: Sequence[str]
    world_size: int
    backend: str
    words: Path

    def attempt(self, hosts: Hosts) -> int | None:
        """Meet, start and watch, until the job is over (its exit code) or host 0 is lost (None)."""
        hosts = hosts.reach()
        try:
            handler = _meeting_point(hosts)
        except RendezvousConnectionError as error:
            if hosts.rank == 0:
                raise BadInput(f"{_place(hosts)}: expected an address of this host, which is NODE_RANK 0") from error
            self._check_may_return(hosts, error)
            return None
        facts = {"backend": self.backend, "WORLD_SIZE": self.world_size, "command": self.arguments[0]}
        agent = Agent(self._spec(handler, hosts), hosts, facts, self.words)
        try:
            return self._run(agent, hosts)
        except (RendezvousConnectionError, DistError) as error:
            self._check_may_return(hosts, error)
            return None
        finally:
            handler.shutdown()

    def _run(self, agent: Agent, hosts: Hosts) -> int:
        try:
            if agent.run() is None:
                raise RunFailed(f"{_place(hosts)}: expected {hosts.count} hosts (NNODES), this is one more")
        except JobOver as over:
            words = over.words
        except SignalException as stop:
            files = sorted(self.words.iterdir())
            words = agent.words_in(files[0]) if files else Words(128 + int(stop.sigval), "", hosts.rank)
            agent.agree(words)
        except RendezvousClosedError:
            ended = Words(3, f"{_place(hosts)}: another host has ended the job", hosts.rank)
            words = agent.ended_by() or ended
        except RendezvousTimeoutError as error:
            raise RunFailed(
                f"{_place(hosts)}: expected {hosts.count} hosts within {hosts.patience:g} s, not all of them came"
            ) from error
        else:
            return 0
        agent.leave()
        if words.line:
            where = f"host {words.host}: " if words.host != hosts.rank else ""
            sys.stderr.write(f"error: {where}{words.line}\n")
        return words.code

    def _check_may_return(self, hosts: Hosts, error: Exception) -> None:
        """Raise RunFailed where host 0, which keeps what the hosts agree on, is lost and not waited for."""
        if hosts.rank == 0 or hosts.restarts == 0:
            raise RunFailed(f"{_place(hosts)}: lost on host {hosts.rank}: {error}") from error
        log.warning("%s: host 0 is lost; waiting for it, %d more times at most", _place(hosts), hosts.restarts)

    def _spec(self, handler: RendezvousHandler, hosts: Hosts) -> WorkerSpec:
        return WorkerSpec(
            role="rqvae",
            local_world_size=self.world_size,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=("-m", "rqvae", *self.arguments),
            max_restarts=hosts.restarts,
            monitor_interval=0.2 if hosts.count == 1 else 0.5,
            local_addr=hosts.own_address,
        )


def _meeting_point(hosts: Hosts) -> RendezvousHandler:
    """Where the agents of all hosts meet: a store of host 0, by address and port rather than by name."""
    several = hosts.count > 1
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"{hosts.address}:{hosts.port}",
            run_id="rqvae" if several else uuid.uuid4().hex,
            min_nodes=hosts.count,
            max_nodes=hosts.count,
            local_addr=hosts.own_address,
            is_host=hosts.rank == 0,
            join_timeout=int(hosts.patience),
        )
    )


def _place(hosts: Hosts) -> str:
    return f"MASTER_ADDR {hosts.address}, MASTER_PORT {hosts.port}"
