"""torchrun's agent, with what a job of several hosts needs besides: one end, one reason, and no useless restart."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from rqvae.backends.hosts import Hosts, use_interface_to
from rqvae.errors import BadInput
from rqvae.processes import STOP_SIGNALS

log = logging.getLogger(__name__)

INTERRUPTED = (130, 143)
"""Exit codes after a signal and a checkpoint."""
_FINAL = (1, 2, *INTERRUPTED)
"""Exit codes that another start would not change: besides these a gate that failed, and bad input."""
_UNSHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torch's switch against the store that it keeps."""
_LOST = re.compile(r"gloo/|Connection (closed|reset|refused)|Broken pipe|NCCL|TCPStore|Socket closed")
"""In a rank's last words: it has lost another one, whose words tell more."""
_OTHERS = 3.0
"""Seconds in which the words of the host that failed first should come."""
_LEAVE = 20.0
"""Seconds that host 0 waits for the others' end: they lose their meeting point with it. Schedulers grant 30."""


@dataclass(frozen=True)
class Words:
    """Why a job is over.

    Args:
        code: exit code.
        line: what to say; empty after an interruption.
        host: number of the host where it happened.
    """

    code: int
    line: str
    host: int

    @property
    def second_hand(self) -> bool:
        """Whether they only tell that another rank was lost."""
        return bool(_LOST.search(self.line))


class JobOver(Exception):  # noqa: N818  (an interruption is no error)
    """A rank has ended the job, and starting it anew would not help or is not allowed any more."""

    def __init__(self, words: Words) -> None:
        super().__init__(words.line)
        self.words = words


class Agent(LocalElasticAgent):
    """Starts and watches this host's processes.

    Beyond its base class:

    - Bad input and an interruption end the job: the processes are not started anew.
    - The first host that ends the job says so to all, which are healthy perhaps and would wait for it.
    - Every start has a store of its own. torch 2.9 keeps one for all starts, with the addresses of processes that are
      dead (two of three restarts that were measured failed with "connectFullMesh failed ... Connection refused"), and
      a host that comes back is never told where it is: both wait for a minute and give up.
    - Hosts that do not fit together are named before any process starts.

    Args:
        spec: what to start, and where the hosts meet.
        hosts: that take part.
        facts: of this host that must be the same on all, such as the backend's name.
        words: folder in which a rank leaves its last words, `CODE MESSAGE` in `rank_RANK`.
    """

    def __init__(self, spec: WorkerSpec, hosts: Hosts, facts: Mapping[str, Any], words: Path) -> None:
        super().__init__(spec, DefaultLogsSpecs())
        self.hosts, self._facts, self._folder = hosts, dict(facts), words
        self._round: Store | None = None
        self._server: TCPStore | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        before = os.environ.get(_UNSHARED)
        os.environ[_UNSHARED] = "1"
        try:
            super()._rendezvous(worker_group)
        finally:  # what is started is to use the store that `_start_workers` makes
            os.environ.pop(_UNSHARED, None)
            os.environ |= {_UNSHARED: before} if before else {}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for file in self._folder.iterdir():
            file.unlink()
        store = worker_group.store
        assert store is not None  # the meeting has just set it
        self._round = store
        if self.hosts.count > 1:
            self._meet(store, worker_group.group_rank)
        if worker_group.group_rank == 0:
            self._server = TCPStore(self.hosts.own_address, 0, is_master=True, wait_for_workers=False)
            store.set("processes", json.dumps([self.hosts.own_address, self._server.port]))
        worker_group.master_addr, worker_group.master_port = json.loads(store.get("processes"))
        return super()._start_workers(worker_group)

    def _meet(self, store: Store, place: int | None) -> None:
        """Raise BadInput, on every host, unless all of them fit together; choose the interface between them."""
        own = {"rank": self.hosts.rank, "address": self.hosts.own_address, "facts": self._facts}
        store.set(f"host/{place}", json.dumps(own))
        all_hosts = [json.loads(store.get(f"host/{i}")) for i in range(self.hosts.count)]
        all_hosts.sort(key=lambda host: host["rank"])
        ranks = [host["rank"] for host in all_hosts]
        if ranks != list(range(self.hosts.count)):
            self._wait_for_all(store)
            raise BadInput(f"NODE_RANK: expected each of 0 to {self.hosts.count - 1} once, got {ranks}")
        first = all_hosts[0]
        for host in all_hosts:
            for key, value in first["facts"].items():
                if host["facts"].get(key) != value:
                    self._wait_for_all(store)
                    raise BadInput(
                        f"host {host['rank']} ({host['address']}): expected {key} {value} as on host 0, got "
                        f"{host['facts'].get(key)}"
                    )
        use_interface_to(next(host["address"] for host in all_hosts if host["rank"] != self.hosts.rank))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            words = self._last_words(result)
            if words.code in _FINAL or not self._remaining_restarts:
                raise JobOver(self.agree(words))
            log.warning("%s: all ranks start anew, %d more times at most", words.line, self._remaining_restarts)
        elif result.state == WorkerState.HEALTHY and self.hosts.count > 1:
            words_of_other = self.ended_by()
            if words_of_other and words_of_other.code not in INTERRUPTED:  # the checkpoint may not be written here yet
                raise JobOver(words_of_other)
        return result

    def _last_words(self, result: RunResult) -> Words:
        """Why this host's processes failed.

        Whose exit was seen first tells little: a rank that gives up closes its connections before it is gone, and the
        others, which wait for it, may be gone earlier. A rank that was killed left no words; else the first words
        count. Death by a signal is a negative code.
        """
        killed = [(rank, failure) for rank, failure in result.failures.items() if failure.exitcode < 0]
        if killed and not (self._folder / f"rank_{killed[0][0]}").exists():
            rank, failure = killed[0]
            return Words(3, f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", self.hosts.rank)
        files = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        if files:
            return self.words_in(files[0])
        return Words(max(failure.exitcode for failure in result.failures.values()), "", self.hosts.rank)

    def words_in(self, file: Path) -> Words:
        """What a rank left."""
        code, _, line = file.read_text().partition(" ")
        return Words(int(code), line, self.hosts.rank)

    def agree(self, words: Words) -> Words:
        """The words of the host that has ended the job: these, where no other one was first."""
        if self.hosts.count == 1 or self._round is None:
            return words
        try:
            end = time.monotonic() + _OTHERS
            while words.second_hand and not self._round.check(["over"]) and time.monotonic() < end:
                time.sleep(0.1)
            return _parsed(self._round.compare_set("over", "", json.dumps(asdict(words))))
        except RuntimeError:  # host 0 is gone
            return words

    def ended_by(self) -> Words | None:
        """Why the job is over, where a host has said so."""
        try:
            if self._round is None or not self._round.check(["over"]):
                return None
            return _parsed(self._round.get("over"))
        except RuntimeError:  # host 0 is gone: the rendezvous, which is asked next, says so
            return None

    def leave(self) -> None:
        """Tell the others that this host is done; see `_wait_for_all`."""
        if self.hosts.count == 1 or self._round is None:
            return
        for number in STOP_SIGNALS:  # a second one would interrupt what the first one asked for
            signal.signal(number, signal.SIG_IGN)
        self._wait_for_all(self._round)

    def _wait_for_all(self, store: Store) -> None:
        """Host 0, with which the store goes, waits until all have read what they need, `_LEAVE` seconds at most."""
        try:
            left = store.add("left", 1)
            end = time.monotonic() + _LEAVE
            while self.hosts.rank == 0 and left < self.hosts.count and time.monotonic() < end:
                time.sleep(0.1)
                left = store.add("left", 0)
        except RuntimeError as error:
            log.debug("the others could not be told: %s", error)


def _parsed(value: bytes) -> Words:
    return Words(**json.loads(value))
