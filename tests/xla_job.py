"""Runs of `python -m rqvae` on torch_xla, each in a process of its own, and what they left behind.

torch_xla must be imported before the first backward pass of a process, which in pytest's it never is.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import finish, only, rows, start, tensors

SMALL = {
    # a DiT with dropped conditions, accumulation 2 and clipping
    "stage2": [
        *("--stage2.init_args.backbone.init_args.width", 8, "--stage2.init_args.backbone.init_args.depth", 1),
        *("--stage2.init_args.backbone.init_args.heads", 2, "--stage2.init_args.drop_condition", 0.5),
        *("--data.dataset.init_args.size", 8, "--train.accumulate", 2, "--pictures.every", "null"),
    ],
    # autoencoder and discriminator, two averages, the adaptive weight, accumulation 2 and clipping
    "stage1_gan": [
        *("--stage1.init_args.width", 4, "--stage1.init_args.norm_groups", 2, "--stage1.init_args.latent_channels", 2),
        *("--gan.discriminator.init_args.width", 4, "--data.dataset.init_args.size", 8, "--data.batch_size", 4),
        *("--data.workers", 0, "--pictures.every", "null", "--online_eval.every", "null"),
    ],
}
SPEEDS = ("train/images_per_s", "train/images_per_s_device", "train/tflops_per_s_device", "train/mfu")


def environment(**more: str) -> dict[str, str]:
    """XLA on the host; its compiler does not optimise, which takes longer than it saves in a test."""
    flags = "--xla_cpu_enable_fast_math=false --xla_backend_optimization_level=0"
    return {**os.environ, "PJRT_DEVICE": "CPU", "XLA_FLAGS": flags, "CUDA_VISIBLE_DEVICES": "", **more}


@dataclass
class Job:
    """A finished run.

    Args:
        folder: of the run.
        steps: after each step: step, programs compiled, programs run. Empty on another backend.
        fallbacks: operations that were left to the host.
    """

    folder: Path
    steps: list[tuple[int, int, int]]
    fallbacks: list[str]

    def rows(self) -> list[dict[str, float]]:
        """The log without speeds."""
        return [{k: v for k, v in row.items() if k not in (*SPEEDS, "time")} for row in rows(self.folder)]


def train(name: str, backend: str, save_dir: Path, *more: object, timeout: float = 280, **variables: str) -> Job:
    """Train `configs/debug/NAME.yaml`, made small, and watch what torch_xla does."""
    counts = save_dir / f"counts_{backend.replace(':', '_')}.json"
    watch = []
    if backend != "cpu":
        observer = {"class_path": "tests.xla_observer.XlaCounters", "init_args": {"file": str(counts)}}
        watch = ["--observers", json.dumps([observer])]
    place = ["--save-dir", save_dir, "--project", backend, "--run-name", "r", "--backend", backend]
    process = start(
        "train", f"configs/debug/{name}.yaml", *SMALL[name], *place, *watch, *more, env=environment(**variables)
    )
    code, errors = finish(process, timeout)
    assert code == 0, errors[-2000:]
    found = json.loads(counts.read_text()) if watch else {"steps": [], "fallbacks": []}
    return Job(only(save_dir / backend, "r_*"), [tuple(row) for row in found["steps"]], found["fallbacks"])


def worst_difference(job: Job, other: Job, steps: int) -> float:
    """Largest difference in the first rows, relative to the largest value of its name, or to 1e-3 if that is more."""
    pairs = list(zip(job.rows()[:steps], other.rows()[:steps], strict=True))
    assert len(pairs) == steps
    assert all(a.keys() == b.keys() for a, b in pairs)
    scale = {k: max(1e-3, *(abs(b[k]) for _, b in pairs)) for k in pairs[0][1]}
    return max(abs(a[k] - b[k]) / scale[k] for a, b in pairs for k in a)


def worst_tensor(job: Job, other: Job, step: int) -> float:
    """Largest difference of two checkpoints: weights, averages and optimizers."""
    ours, theirs = tensors(job.folder, step), tensors(other.folder, step)
    assert ours.keys() == theirs.keys()
    return max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours if torch.numel(ours[k]))
