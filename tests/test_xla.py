"""The XLA backend on the host's cores against the eager one, and that a step is one program, compiled once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rqvae import backends
from rqvae.backends import selfcheck, xla_environment
from rqvae.backends.lazy_adamw import LazyAdamW
from rqvae.backends.thread_feed import fetched_ahead
from rqvae.errors import BadInput
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.processes import stop_signals
from tests.conftest import ROOT, assert_same, finish, only, rows, start, tensors
from tests.xla_job import SMALL, environment, train, worst_difference, worst_tensor

needs_xla = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch_xla is not installed")
EXACT = ["--train.precision", "fp64"]


# AdamW


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_lazy_adamw_is_torchs(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 3), (5,), ())]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [LazyAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)]
    for step in range(30):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 30)
            optimizer.step()
        worst = max(float((p - q).detach().abs().max()) for p, q in zip(ours, theirs, strict=True))
        assert worst <= limit, step
    for p, q in zip(ours, theirs, strict=True):
        state, reference = optimizers[0].state[p], optimizers[1].state[q]
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in reference.items()}


def test_lazy_adamw_leaves_a_step_out() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LazyAdamW([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    before = [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]
    p.grad, optimizer.found_inf = torch.full((3,), math.nan), torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [p.detach(), *optimizer.state[p].values()], strict=True))


# the feed's thread


def test_feed_raises_what_the_source_raised_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield from range(7)
        raise OSError("image 7 cannot be read")

    got: list[int] = []
    with pytest.raises(OSError, match="image 7 cannot be read"):
        got.extend(fetched_ahead(source(), lambda x: 10 * x))
    assert got == [0, 10, 20, 30, 40, 50, 60]


def test_feed_closes_its_source_in_its_own_thread() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.append(threading.current_thread().name)

    feed = fetched_ahead(source(), lambda x: x, ahead=2)
    assert [next(feed), next(feed)] == [0, 1]
    feed.close()  # type: ignore[attr-defined]
    assert closed == ["feed"]


# choosing


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.choose("xla") == "xla"
    assert backends.choose("xla:spmd") == "xla:spmd"
    with pytest.raises(BadInput, match="expected options of xla among spmd, matmul_high, matmul_default, got fast"):
        backends.choose("xla:fast")
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    assert backends.choose() == "xla"
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert backends.choose() == "cpu"


def test_without_torch_xla_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(BadInput, match="expected torch_xla"):
        backends.create("xla")


def test_without_a_tpu_the_cores_compute_only_where_they_are_asked_for(
    tmp_path: Path, cli, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By train, a launched job, the self-check and the diagnostic; nothing is made or left in the environment."""
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    monkeypatch.setattr(xla_environment, "_PCI", tmp_path)
    monkeypatch.setattr(xla_environment, "find_spec", lambda _: True)
    train_line = ["train", "configs/debug/stage2.yaml", "--save-dir", tmp_path / "runs", "--backend", "xla"]
    diagnose_line = ["diagnose", "--output", tmp_path / "out", "--device", "xla", "--model_name", tmp_path]
    for line in (train_line, [*train_line, "--world-size", 2], ["selfcheck", "xla"], diagnose_line):
        assert cli(*line) == 2
        errors = capfd.readouterr().err.splitlines()
        assert errors[-1] == (
            "error: backend xla: expected a TPU on this host, found none; "
            "set PJRT_DEVICE=CPU to run XLA on this host's cores"
        )
    assert "PJRT_DEVICE" not in os.environ
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    xla_environment.prepare()
    assert xla_environment.on_host()


@pytest.mark.parametrize("variable", ["XLA_USE_BF16", "XLA_DOWNCAST_BF16"])
def test_hidden_bf16_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(BadInput, match=variable):
        backends.create("xla")


def test_eager_training_does_not_import_it(tmp_path: Path) -> None:
    code = (
        "import sys; from rqvae.cli import run; code = run(sys.argv[1:]); "
        "print(code, [name for name in sys.modules if name.startswith('torch_xla')][:3])"
    )
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "r", "--train.steps", 1, "--backend", "cpu"]
    command = [sys.executable, "-c", code, "train", "configs/debug/stage2.yaml", *map(str, [*SMALL["stage2"], *place])]
    assert subprocess.run(command, capture_output=True, text=True, timeout=100).stdout.strip() == "0 []"


def test_listeners_outside_the_main_thread_hear_of_signals() -> None:
    """In a process that was started with both signals blocked, as replicas are."""
    code = """
import os, signal, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
from rqvae.processes import answer_stop_signals, stop_signals
answer_stop_signals()
heard = []
def train():
    with stop_signals(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        while not heard:
            time.sleep(0.01)
thread = threading.Thread(target=train); thread.start(); thread.join()
print(heard, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15)
    assert (done.stdout.strip(), done.returncode) == ("[15]", 128 + signal.SIGTERM)


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals(lambda _: None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# what the environment and the options choose

CHOICES = """
import os, sys
from rqvae import backends
from rqvae.backends import xla_environment
from rqvae.errors import BadInput
import torch_xla.backends, torch_xla.runtime as xr

for option in ("", ":matmul_high", ":matmul_default"):
    os.environ.pop("RQVAE_XLA_MATMUL", None)
    backends.create("xla" + option)
    print(torch_xla.backends.get_mat_mul_precision())
for name, value in (("RQVAE_XLA_MATMUL", "bf16"), ("RQVAE_XLA_CACHE", sys.argv[1])):
    os.environ[name] = value
    try:
        backends.create("xla")
    except BadInput as error:
        print(error)
    os.environ.pop("RQVAE_XLA_MATMUL", None)
xr.initialize_cache = print
xla_environment.on_host = lambda: False
print(backends.create("xla").widest_float)
"""


@needs_xla
@pytest.mark.slow
def test_precision_of_products_and_the_cache_of_programs(tmp_path: Path) -> None:
    """The cache as on a TPU, whose only stand-in here is a host that denies to be one: torch_xla gets the folder."""
    command = [sys.executable, "-c", CHOICES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        *("highest", "high", "default"),
        "RQVAE_XLA_MATMUL: expected highest, high or default, got bf16",
        "RQVAE_XLA_CACHE: expected to be unset without a TPU",
        str(tmp_path),
        "torch.float32",
    ]


# the self-check


def test_selfcheck_of_the_cpu(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("selfcheck", "cpu", "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["backend"], found["world_size"]) == ("cpu", 1)
    assert all(set(check) == {"name", "ok", "value", "limit"} for check in found["checks"])
    assert {"loss curve, relative to one CPU process", "peak memory, MiB"} <= {c["name"] for c in found["checks"]}
    monkeypatch.setattr(selfcheck, "GOLDEN_NORMS", tuple(1.01 * x for x in selfcheck.GOLDEN_NORMS))
    assert cli("selfcheck", "cpu") == 1


def checked(*arguments: object, timeout: float = 250) -> dict[str, Any]:
    command = [sys.executable, "-m", "rqvae.backends.selfcheck", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(Path(str(arguments[-1])).read_text())


@needs_xla
def test_selfcheck_of_xla(tmp_path: Path) -> None:
    """Losses, norms, average and checkpoint as on the CPU; no program compiled after step 5, one run a step."""
    found = checked("xla", "--json", tmp_path / "out.json")
    assert found["device"] == "XLA:CPU"
    assert "programs compiled in steps 5 to 20" in [check["name"] for check in found["checks"]]


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_selfcheck_of_two_ranks(backend: str, tmp_path: Path) -> None:
    found = checked(backend, "--world-size", 2, "--json", tmp_path / "out.json")
    assert found["world_size"] == 2
    norms = "gradient norms after accumulation and clipping, between ranks"
    assert [check["value"] for check in found["checks"] if check["name"] == norms] == [0]


@needs_xla
@pytest.mark.slow
def test_selfcheck_of_spmd_on_four_devices(tmp_path: Path) -> None:
    assert checked("xla:spmd", "--world-size", 4, "--json", tmp_path / "out.json")["world_size"] == 1


# training


def steady(job: Any, steps: int = 20) -> tuple[int, int]:
    """Programs compiled after step 5, and programs run in those steps."""
    counts = {step: (compiled, run) for step, compiled, run in job.steps}
    return counts[steps][0] - counts[5][0], counts[steps][1] - counts[5][1]


@needs_xla
def test_dit_equals_eager_in_one_program(tmp_path: Path) -> None:
    """20 steps in float64, a checkpoint every 5 and a row every step; then the same command again has nothing to do."""
    job, eager = (train("stage2", name, tmp_path, *EXACT) for name in ("xla", "cpu"))
    assert worst_difference(job, eager, 20) < 1e-7
    assert worst_tensor(job, eager, 20) < 1e-7
    assert steady(job) == (0, 15)
    assert not job.fallbacks


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 3])
def test_gan_equals_eager_in_one_program(log_every: int, tmp_path: Path) -> None:
    more = [*EXACT, "--train.log_every", log_every]
    job, eager = (train("stage1_gan", name, tmp_path, *more) for name in ("xla", "cpu"))
    assert worst_difference(job, eager, len(eager.rows())) < 1e-7
    assert worst_tensor(job, eager, 20) < 1e-7
    assert steady(job) == (0, 15)
    assert not job.fallbacks


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "devices"), [("xla", 1), ("xla", 2), ("xla:spmd", 4)])
def test_gan_in_fp32(backend: str, devices: int, tmp_path: Path) -> None:
    """The first 5 steps: a hinge that changes sides amplifies rounding afterwards."""
    more = ["--train.steps", 5]
    more += ["--data.batch_size", 8, "--stage1.init_args.multipliers", "[1]"] if devices > 1 else []
    job = train("stage1_gan", backend, tmp_path, "--world-size", devices, *more)
    assert worst_difference(job, train("stage1_gan", "cpu", tmp_path, *more), 5) < 1e-3
    assert not job.fallbacks


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage2", "stage1_gan"])
def test_two_replicas_equal_one_eager_process(name: str, tmp_path: Path) -> None:
    """Accumulation 2 and clipping: what in-place reduction gets wrong."""
    more = [*EXACT, *(["--stage1.init_args.multipliers", "[1]"] if name == "stage1_gan" else [])]
    job = train(name, "xla", tmp_path, "--world-size", 2, *more)
    eager = train(name, "cpu", tmp_path, *more)
    assert worst_difference(job, eager, 20) < 1e-7
    assert worst_tensor(job, eager, 20) < 1e-7
    assert steady(job)[0] == 0
    assert not job.fallbacks


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage2", "stage1_gan"])
def test_spmd_on_four_devices_equals_one_eager_process(name: str, tmp_path: Path) -> None:
    more = [
        *EXACT,
        *(["--data.batch_size", 8, "--stage1.init_args.multipliers", "[1]"] if name == "stage1_gan" else []),
    ]
    job = train(name, "xla:spmd", tmp_path, "--world-size", 4, *more)
    eager = train(name, "cpu", tmp_path, *more)
    assert worst_difference(job, eager, 20) < 1e-7
    assert worst_tensor(job, eager, 20) < 1e-7
    assert steady(job) == (0, 15)
    assert not job.fallbacks


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage2", "stage1_gan"])
def test_without_functionalization(name: str, tmp_path: Path) -> None:
    """XLA_DISABLE_FUNCTIONALIZATION=1, which some recommend for speed: the same numbers."""
    job = train(name, "xla", tmp_path, *EXACT, "--train.steps", 6, XLA_DISABLE_FUNCTIONALIZATION="1")
    eager = train(name, "cpu", tmp_path, *EXACT, "--train.steps", 6)
    assert worst_difference(job, eager, 6) < 1e-7


@needs_xla
@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = train("stage2", "xla", tmp_path / "whole", "--train.log_every", 4)
    place = ["--save-dir", tmp_path / "cut", "--project", "xla", "--run-name", "r", "--backend", "xla"]
    command = ["train", "configs/debug/stage2.yaml", *SMALL["stage2"], "--train.log_every", 4, *place]
    process = start(*command, env=environment())
    deadline = time.monotonic() + 200
    while not list((tmp_path / "cut").glob("xla/*/checkpoints/step_00000010/COMPLETE")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    finish(process)
    assert finish(start(*command, env=environment()), 200)[0] == 0
    run = only(tmp_path / "cut" / "xla")
    assert_same(tensors(run, 20), tensors(whole.folder, 20))
    assert [row["train/loss_total"] for row in rows(run)] == [row["train/loss_total"] for row in whole.rows()]


@needs_xla
@pytest.mark.slow
def test_sigterm_of_two_replicas_leaves_a_checkpoint(tmp_path: Path) -> None:
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "r", "--backend", "xla", "--world-size", 2]
    more = ["--train.steps", 100000, "--checkpoint.every", 100000, "--train.stop_check_seconds", 1]
    process = start("train", "configs/debug/stage2.yaml", *SMALL["stage2"], *place, *more, env=environment())
    deadline = time.monotonic() + 200
    while not any(p.stat().st_size for p in tmp_path.glob("p/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 60)[0] == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("p/*/checkpoints/step_*/COMPLETE"))) == 1


class Unreadable(SkimagePhotos):
    """A dataset whose sample 30 of the stream cannot be read."""

    def __getitem__(self, index: int) -> Any:
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked > 30:
            raise BadInput("photo 30: cannot be read")
        return super().__getitem__(index)


@pytest.mark.slow
@needs_xla
def test_an_error_of_the_dataset_ends_the_run_with_its_words(tmp_path: Path) -> None:
    """torch_xla's own loader ends the epoch instead, as if all were well."""
    place = ["--save-dir", tmp_path, "--project", "p", "--run-name", "r", "--backend", "xla"]
    broken = ["--data.dataset", json.dumps({"class_path": f"{__name__}.Unreadable", "init_args": {"size": 8}})]
    command = ["train", "configs/debug/stage2.yaml", *SMALL["stage2"], *broken, *place, "--checkpoint.every", 100]
    code, errors = finish(start(*command, env=environment()), 200)
    assert (code, errors.splitlines()[-1]) == (2, "error: photo 30: cannot be read")
    run = only(tmp_path / "p")
    assert [row["step"] for row in rows(run)] == [1, 2, 3], "the rows of the steps that were done"


@needs_xla
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.precision=fp16", "train.precision: expected fp32, bf16 or fp64 with the xla backend, got fp16"),
        pytest.param(
            "train.compile=true", "train.compile: expected false with the xla backend", marks=pytest.mark.slow
        ),
    ],
)
def test_bad_input(setting: str, words: str, tmp_path: Path) -> None:
    """In one line, before anything is computed."""
    place = ["--save-dir", tmp_path, "--backend", "xla"]
    code, errors = finish(start("train", "configs/debug/stage2.yaml", *place, f"--{setting}", env=environment()))
    assert code == 2
    assert words in errors.splitlines()[-1]


def test_tpu_is_seen_by_its_pci_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    monkeypatch.setattr(xla_environment, "_PCI", tmp_path)
    assert not xla_environment.tpu_present()
    for name, vendor, device in (("a", "0x1ae0", "0x0042"), ("b", "0x8086", "0x005e"), ("c", "0x1ae0", "0x005e")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device").write_text(device + "\n")
        assert xla_environment.tpu_present() == (name == "c"), name
