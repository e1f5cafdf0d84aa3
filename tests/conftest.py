"""What the tests share: the command line, in this process and in one of its own."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from rqvae.trainers.meter import Meter

ROOT = Path(__file__).parent.parent
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def cli() -> Callable[..., int]:
    """Run a command in this process: `cli("train", ...)` returns the exit code."""
    from rqvae.cli import run

    return lambda *arguments: run([str(a) for a in arguments])


@pytest.fixture(scope="session")
def _vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers writes of an `AutoencoderKL` with Stable Diffusion's factor and latent, few channels."""
    from rqvae.models.stage1.untrained_autoencoder_kl import UntrainedAutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    small = UntrainedAutoencoderKL(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_groups=4)
    small.save_source(folder)
    return folder


@pytest.fixture
def small_hub_vae(_vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of every autoencoder that a config takes from the hub."""
    monkeypatch.setattr("rqvae.models.stage1.diffusers_vae.find_folder", lambda *_, **__: _vae_folder)
    return _vae_folder


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start `python -m rqvae ...` as a process of its own."""
    command = [sys.executable, "-m", "rqvae", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Wait for it; exit code and what it wrote to stderr."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and that no connection is given meanwhile: below those that the system hands out."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 2_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
        if len(ports) == count:
            break
    return ports


def only(parent: Path, pattern: str = "*") -> Path:
    """The one path that matches."""
    found = sorted(parent.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def rows(run: Path) -> list[dict[str, float]]:
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, float]]:
    """The rows without what a clock on the wall says."""
    clock = ("time", "train/images_per_s", "train/images_per_s_device", "train/tflops_per_s_device", "train/mfu")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(run)]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    assert (folder / "COMPLETE").exists(), folder
    files = sorted(folder.rglob("*.safetensors"))
    # clones: what is loaded is a view of the file, and changes with it
    return {f"{f.relative_to(folder).with_suffix('')}:{k}": v.clone() for f in files for k, v in load_file(f).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different[:5]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of tensors, relative to each tensor's largest entry, or to 0.01 if that is more.

    Why a floor: the hinge loss gives the discriminator's last bias a gradient that is zero but for rounding (1e-18)
    while all logits lie in the margin; Adam divides it by its eps of 1e-8, and the bias itself is 1e-4.
    """
    assert a.keys() == b.keys()
    worst = 0.0
    for key, value in a.items():
        if value.numel():
            scale = max(float(value.abs().max()), 1e-2)
            worst = max(worst, float((value - b[key]).abs().max()) / scale)
    return worst


def means_of(meter: Meter) -> dict[str, float]:
    """What a row would say of a meter's observations, which it forgets."""
    window = meter.take()
    return window.means({name: value.item() for name, value in window.tensors.items()})
