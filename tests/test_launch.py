"""Jobs of several hosts: here two launchers on two addresses of this machine, or in two network namespaces."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from rqvae import backends
from rqvae.backends import hosts as hosts_module
from rqvae.backends import launch as launch_module
from rqvae.backends.agent import Words
from rqvae.backends.hosts import Hosts
from rqvae.errors import BadInput, RunFailed
from tests.conftest import ROOT, free_ports, largest_difference, only, rows, tensors

SLOW = '[{"class_path": "tests.observers.Slow", "init_args": {"seconds": 0.15}}]'
STEPS = 20


def command(save_dir: Path, *more: object) -> list[str]:
    line = ["train", "configs/debug/stage2.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r"]
    line += ["--train.precision", "fp64", "--data.workers", 0, "--pictures.every", "null", "--observers", SLOW]
    return [str(word) for word in [*line, "--train.stop_check_seconds", 0.2, "--checkpoint.every", 5, *more]]


@dataclass
class Machines:
    """Two hosts, on which a command is started by hand as a scheduler would do it."""

    logs: Path
    restarts: int = 0
    patience: int = 90
    within: tuple[tuple[str, ...], ...] = ((), ())
    addresses: tuple[str, str] = ("127.0.0.2", "127.0.0.3")
    port: int = field(default_factory=lambda: free_ports(1)[0])
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, rank: int, line: list[str], **more: str) -> subprocess.Popen[str]:
        own = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": self.addresses[0], "MASTER_PORT": str(self.port)}
        own |= {"RQVAE_HOSTS_TIMEOUT": str(self.patience), "RQVAE_MAX_RESTARTS": str(self.restarts)}
        if not self.within[rank]:
            own["RQVAE_HOST_ADDR"] = self.addresses[rank]
        with (self.logs / f"host_{rank}.log").open("a") as log:
            process = subprocess.Popen(
                [*self.within[rank], sys.executable, "-m", "rqvae", *line],
                stdout=log, stderr=log, text=True, cwd=ROOT, env={**os.environ, **own, **more}, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def both(self, line: list[str]) -> list[subprocess.Popen[str]]:
        return [self.start(rank, line) for rank in (0, 1)]

    def said(self, rank: int) -> str:
        return (self.logs / f"host_{rank}.log").read_text()

    def errors(self, rank: int) -> list[str]:
        return [line for line in self.said(rank).splitlines() if line.startswith("error: ")]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    yield found
    for process in found.started:
        if process.poll() is None:
            pull_the_plug(process)


def pull_the_plug(launcher: subprocess.Popen[str]) -> None:
    """SIGKILL to a launcher and to the processes that it has started."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pids, parents = {launcher.pid}, dict(tuple(map(int, row.split())) for row in listing.splitlines())
    for _ in range(4):
        pids |= {pid for pid, parent in parents.items() if parent in pids}
    for pid in pids:
        with_signal(pid, signal.SIGKILL)
    launcher.wait()


def with_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_for_step(save_dir: Path, step: int, timeout: float = 90) -> Path:
    """Until the run has logged `step`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for file in save_dir.glob("p/r_*/metrics.jsonl"):
            if len(file.read_text().splitlines()) >= step:
                return file.parent
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {save_dir}")


def codes(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[int]:
    return [process.wait(timeout) for process in processes]


def assert_undisturbed(run: Path, other: Path, cli: Callable[..., int]) -> None:
    """A run's end is that of one process which nobody disturbed, and each step was logged once."""
    assert cli(*command(other)) == 0
    assert largest_difference(tensors(only(other / "p"), STEPS), tensors(run, STEPS)) < 1e-9
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))


def lose_a_host(machines: Machines, lost: int, save_dir: Path) -> Path:
    """Train on both, kill one at a random step, start its command again; the run's folder."""
    machines.restarts = 2
    processes = machines.both(command(save_dir, "--fresh"))
    run = wait_for_step(save_dir, random.randint(2, 14))
    pull_the_plug(processes[lost])
    processes[lost] = machines.start(lost, command(save_dir, "--fresh"))
    assert codes(processes) == [0, 0], machines.said(0) + machines.said(1)
    assert only(save_dir / "p") == run
    return run


def test_a_lost_host_comes_back_and_the_job_ends_as_undisturbed(machines: Machines, tmp_path: Path, cli) -> None:
    run = lose_a_host(machines, 1, tmp_path / "two")
    assert_undisturbed(run, tmp_path / "one", cli)
