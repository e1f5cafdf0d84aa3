"""Jobs of several hosts: here two launchers on two addresses of this machine, or in two network namespaces."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from rqvae import backends
from rqvae.backends.hosts import Hosts
from rqvae.backends.launch import _Job
from rqvae.errors import BadInput, RunFailed
from tests.conftest import ROOT, finish, free_ports, largest_difference, only, rows, start, tensors

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


@pytest.mark.slow
def test_a_lost_host_comes_back_and_the_job_ends_as_undisturbed(machines: Machines, tmp_path: Path, cli) -> None:
    run = lose_a_host(machines, 1, tmp_path / "two")
    assert_undisturbed(run, tmp_path / "one", cli)


@pytest.mark.slow
def test_host_0_comes_back_too(machines: Machines, tmp_path: Path, cli) -> None:
    """It keeps what the hosts agree on: the other one waits for it."""
    run = lose_a_host(machines, 0, tmp_path / "two")
    assert "host 0 is lost; waiting for it" in machines.said(1)
    assert_undisturbed(run, tmp_path / "one", cli)


def test_sigterm_to_one_host_saves_on_all_and_the_same_command_goes_on(machines: Machines, tmp_path: Path, cli) -> None:
    """With restarts allowed: an interruption is not what they are for."""
    machines.restarts = 2
    line = command(tmp_path / "two", "--checkpoint.every", 1000)
    processes = machines.both(line)
    run = wait_for_step(tmp_path / "two", 3)
    processes[1].send_signal(signal.SIGTERM)
    assert codes(processes) == [143, 143], machines.said(0) + machines.said(1)
    step = len(rows(run))
    assert step < STEPS
    assert tensors(run, step), "a checkpoint of the step at which all stopped"
    assert cli(*line) == 0, "the same command, by one process"
    assert only(tmp_path / "two" / "p") == run
    assert_undisturbed(run, tmp_path / "one", cli)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_process_is_started_anew(world_size: int, machines: Machines, tmp_path: Path, cli) -> None:
    """On one host, with --fresh: the second start goes on with the run of the first."""
    line = command(tmp_path / "two", "--fresh", "--world-size", world_size)
    older = command(tmp_path / "two", "--train.steps", STEPS)
    assert cli(*older, "--run-name", "r") == 0, "an older run of the same config, which is finished"
    (before,) = (tmp_path / "two" / "p").iterdir()
    time.sleep(1.1)
    launcher = machines.start(0, line, NNODES="1", RQVAE_MAX_RESTARTS="1")
    end = time.monotonic() + 60
    while time.monotonic() < end and not (runs := [p for p in before.parent.iterdir() if p != before]):
        time.sleep(0.02)
    (run,) = runs
    while len((run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ()) < 7:
        time.sleep(0.02)
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True).stdout
    os.kill(int(listing.split()[-1]), signal.SIGKILL)
    assert launcher.wait(90) == 0, machines.said(0)
    assert "was killed by SIGKILL: all ranks start anew, 1 more times at most" in machines.said(0)
    assert {p.name for p in before.parent.iterdir()} == {before.name, run.name}
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert largest_difference(tensors(before, STEPS), tensors(run, STEPS)) < 1e-9


def test_the_words_of_the_rank_that_failed_end_all_hosts(machines: Machines) -> None:
    """It fails before it joins the others: they would wait for ten minutes."""
    begun = time.monotonic()
    processes = [machines.start(0, ["selfcheck", "cpu"]), machines.start(1, ["selfcheck", "cpu"], XLA_USE_BF16="1")]
    assert codes(processes, 60) == [2, 2]
    assert time.monotonic() - begun < 60
    line = "XLA_USE_BF16: expected to be unset (train.precision chooses bf16)"
    assert machines.errors(1) == [f"error: {line}"]
    assert machines.errors(0) == [f"error: host 1: {line}"]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_rank_that_is_killed_before_it_joins_ends_all(hosts: int, machines: Machines, tmp_path: Path) -> None:
    """By SIGKILL while its interpreter starts: it leaves no words, and the other one waits for it in vain."""
    code = "if os.environ.get('RANK', '-') in os.environ['DOOMED']: os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "sitecustomize.py").write_text(f"import os, signal\n{code}")
    more = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    if hosts == 1:
        line = ["selfcheck", "cpu", "--world-size", "2"]
        assert codes([machines.start(0, line, NNODES="1", DOOMED="1", **more)], 60) == [3], machines.said(0)
        assert machines.errors(0) == ["error: rank 1 was killed by SIGKILL"]
    else:
        processes = [
            machines.start(0, ["selfcheck", "cpu"]),
            machines.start(1, ["selfcheck", "cpu"], DOOMED="01", **more),
        ]
        assert codes(processes, 60) == [3, 3], machines.said(0) + machines.said(1)
        (line,) = machines.errors(1)
        assert re.fullmatch("error: rank [01] was killed by SIGKILL", line)
        assert machines.errors(0) == [line.replace("error: ", "error: host 1: ")]


@pytest.mark.slow
def test_hosts_that_share_no_folder_are_told(machines: Machines, tmp_path: Path) -> None:
    """Host 1 has another file system at SAVE_DIR, in a mount namespace of its own."""
    save_dir = tmp_path / "runs"
    save_dir.mkdir()
    own = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {save_dir} && exec "$0" "$@"')
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    machines.within = ((), own)
    assert codes(machines.both(command(save_dir)), 90) == [2, 2]
    (first,), (second,) = machines.errors(0), machines.errors(1)
    words = "SAVE_DIR: expected a folder that all hosts share, rank 1 does not see rank 0's "
    assert words in first
    assert first.partition("SAVE_DIR")[2] == second.partition("SAVE_DIR")[2]


def test_a_folder_that_is_not_shared_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2: rank 0 has written elsewhere."""
    from rqvae.trainers import joint_start

    class Second:
        rank, world_size = 1, 2

        def broadcast(self, value: object) -> object:
            return value

        def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
            return x

    monkeypatch.setattr(joint_start, "_CACHED", 0.1)
    monkeypatch.setattr(joint_start, "on_main", lambda backend, action: None)
    with pytest.raises(BadInput, match="a folder that all hosts share, rank 1 does not see rank 0's"):
        joint_start.check_shared(Second(), tmp_path)  # type: ignore[arg-type]


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an agent sets in its process's environment while it meets others, for all threads at all times."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def meet(tmp_path: Path, *hosts: Hosts, backends_of_hosts: Sequence[str] = ("cpu",) * 3) -> list[str]:
    """Have launchers meet in threads, where what they say of each other comes before any process; their errors."""
    said: dict[int, str] = {}

    def attempt(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            _Job(["train"], 1, backends_of_hosts[number], folder).attempt(hosts[number])
        except (BadInput, RunFailed) as error:
            said[number] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [said[number] for number in sorted(said)]


@pytest.mark.usefixtures("in_threads")
def test_mixed_backends_are_told_on_both_hosts(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    hosts = [Hosts(2, rank, "127.0.0.2", port) for rank in (0, 1)]
    said = meet(tmp_path, *hosts, backends_of_hosts=("cpu", "cuda"))
    assert said == ["BadInput: host 1 (127.0.0.1): expected backend cpu as on host 0, got cuda"] * 2


@pytest.mark.usefixtures("in_threads")
def test_two_hosts_of_one_number_are_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    hosts = [Hosts(3, rank, "127.0.0.2", port) for rank in (0, 1, 1)]
    assert meet(tmp_path, *hosts) == ["BadInput: NODE_RANK: expected each of 0 to 2 once, got [0, 1, 1]"] * 3


def test_hosts_that_do_not_come_are_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    said = meet(tmp_path, Hosts(2, 0, "127.0.0.2", port, patience=2))
    where = f"MASTER_ADDR 127.0.0.2, MASTER_PORT {port}"
    assert said == [f"RunFailed: {where}: expected 2 hosts within 2 s, not all of them came"]


@pytest.mark.parametrize("address", ["127.0.0.9", "192.0.2.1", "no-such-host.invalid"])
def test_unreachable_host_0_is_named(address: str, tmp_path: Path, cli, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, before a process is started or a folder made; 192.0.2.1 is no host anywhere (RFC 5737)."""
    own = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": address, "MASTER_PORT": free_ports(1)[0]}
    for name, value in (own | {"RQVAE_HOSTS_TIMEOUT": 1}).items():
        monkeypatch.setenv(name, str(value))
    begun = time.monotonic()
    assert cli(*command(tmp_path / "s")) == 2
    assert time.monotonic() - begun < 15
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    place = f"MASTER_ADDR {address}, MASTER_PORT {own['MASTER_PORT']}"
    assert line.startswith(f"error: {place}: expected host 0 to answer within 1 s, got: ")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NNODES": "1:4"}, "NNODES: expected a whole number from 1 to 100000, got 1:4"),
        ({"NNODES": "2"}, "NODE_RANK: expected a whole number from 0 to 1, got nothing"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK: expected a whole number from 0 to 1, got 2"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_PORT: expected a whole number from 1 to 65535, got nothing"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR: expected the address of host 0"),
        ({"RQVAE_MAX_RESTARTS": "-1"}, "RQVAE_MAX_RESTARTS: expected a whole number from 0 to 1000000, got -1"),
        ({"NNODES": "3"}, "data.batch_size: expected a multiple of train.accumulate x world size = 1 x 3"),
    ],
)
def test_mistakes_in_the_environment(
    environment: dict[str, str], expected: str, tmp_path: Path, cli, capfd, monkeypatch
):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli(*command(tmp_path / "s")) == 2
    assert f"error: {expected}" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = meet(tmp_path, Hosts(2, 0, "127.0.0.2", port, patience=2))
    assert said == [f"BadInput: MASTER_PORT {port}: expected a free port on host 0, got: Address already in use"]


def test_more_processes_than_devices(tmp_path: Path, cli, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli(*command(tmp_path / "s", "--world-size", 2, "--backend", "cuda", "--train.precision", "fp32")) == 2
    assert "error: --world-size: expected at most 1 (GPUs of this host), got 2" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_several_hosts_and_restarts_are_not_for_xla_on_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(BadInput, match="NNODES: expected 1 with xla on the host's cores"):
        backends.launch(["selfcheck", "xla"], 2, backend="xla")
    monkeypatch.setenv("NNODES", "1")
    monkeypatch.setenv("RQVAE_MAX_RESTARTS", "3")
    with pytest.raises(BadInput, match="RQVAE_MAX_RESTARTS: expected 0 with backend xla"):
        backends.launch(["selfcheck", "xla"], 2, backend="xla")


@pytest.mark.slow
def test_checkpoint_of_four_processes_goes_on_with_one(tmp_path: Path, cli) -> None:
    """Both kinds: whole tensors, and split over the four processes."""
    for parallel in ("data", "sharded"):
        save_dir = tmp_path / parallel
        line = command(save_dir, "--train.parallel", parallel, "--world-size")
        process = start(*line, 4)
        run = wait_for_step(save_dir, 7)
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 143
        assert cli(*line, 1) == 0
        assert_undisturbed(run, tmp_path / f"one {parallel}", cli)


def can_make_namespaces() -> bool:
    done = subprocess.run(["ip", "netns", "add", f"rqvae{os.getpid()}"], capture_output=True)
    subprocess.run(["ip", "netns", "del", f"rqvae{os.getpid()}"], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def namespaces(tmp_path: Path) -> Iterator[Machines]:
    """Two network namespaces with a cable between them: two hosts as far as the network is concerned."""
    if shutil.which("ip") is None or not can_make_namespaces():
        pytest.skip("network namespaces are not allowed here")
    names = [f"rq{os.getpid()}{end}" for end in "ab"]
    addresses = ("10.231.7.1", "10.231.7.2")
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", names[0], "type", "veth", "peer", "name", names[1]]]
    for name, address in zip(names, addresses, strict=True):
        steps += [["link", "set", name, "netns", name], ["-n", name, "addr", "add", f"{address}/24", "dev", name]]
        steps += [["-n", name, "link", "set", name, "up"], ["-n", name, "link", "set", "lo", "up"]]
    for step in steps:
        subprocess.run(["ip", *step], check=True)
    within = tuple(("ip", "netns", "exec", name) for name in names)
    found = Machines(tmp_path, within=within, addresses=addresses)  # type: ignore[arg-type]
    yield found
    for process in found.started:
        if process.poll() is None:
            pull_the_plug(process)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.slow
def test_two_network_namespaces_train_and_a_lost_one_comes_back(namespaces: Machines, tmp_path: Path, cli) -> None:
    """Each finds its own address and interface: nothing but MASTER_ADDR is given."""
    run = lose_a_host(namespaces, 1, tmp_path / "two")
    assert_undisturbed(run, tmp_path / "one", cli)
