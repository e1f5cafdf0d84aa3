"""`python -m rqvae demo`: the whole way on a laptop, by the same commands that a user types.

Record maze frames, train the autoencoder, reconstruct the test split, train the generator, sample, score, report.
Budgets are in steps, so that a busy machine changes the time and not the result; what is done is not done again.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.errors import RunFailed
from rqvae.processes import die_with_parent
from rqvae.reports.demo import write_demo_report

CONFIGS = Path(__file__).parent.parent / "configs" / "maze_chase"
FRAMES, SIZE = 20_000, 32


@dataclass
class Demo:
    """The demo's folder and its parts.

    Args:
        root: for example runs/demo.
        threads: OpenMP threads of each part, 0 to leave torch's choice.
        overrides: config overrides of both trainings, for a shorter demo.
        frames: how many to record.
    """

    root: Path
    threads: int = 0
    overrides: tuple[str, ...] = ()
    frames: int = FRAMES
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns the summary that is also written to summary.json."""
        from rqvae.trainers.run_folder import make_folder

        make_folder(self.root, "--out")
        times = self.root / "parts.json"
        self.parts = json.loads(times.read_text()) if times.exists() else {}
        frames = self.root / "frames"
        data = ["--data.dataset.init_args.root", str(frames), *self.overrides]
        job = ["--save-dir", str(self.root), *(["--threads", str(self.threads)] if self.threads else [])]
        self._part(
            "collect",
            ["collect", "maze-chase", "--frames", str(self.frames), "--size", str(SIZE), "--out", str(frames)],
        )
        train = ["train", *job, "--project", "train"]
        self._part("stage1", [*train, "--stage", "1", "--run-name", "stage1", str(CONFIGS / "klvae_f4.yaml"), *data])
        stage1 = self.newest("stage1")
        recon = ["recon", *job, "--run-name", "recon", "--ckpt", str(stage1), str(CONFIGS / "klvae_f4.yaml")]
        self._part("recon", [*recon, "--data.dataset.init_args.root", str(frames)])
        config = [str(CONFIGS / "dit_frame.yaml"), "--stage1_checkpoint", str(stage1), *data]
        self._part("stage2", [*train, "--stage", "2", "--run-name", "stage2", *config])
        summary = self._summary({"nearest_train_psnr": self._sample()})
        write_demo_report(self.root)
        return summary

    def _sample(self) -> float:
        """Samples of the newest generator, and their score; an earlier call's where the generator is the same."""
        run, note = self.newest("stage2"), self.root / "samples.json"
        held = json.loads(note.read_text()) if note.exists() else {}
        if held.get("run") != str(run):
            import torch

            torch.set_num_threads(self.threads or torch.get_num_threads())
            started, cpu = time.monotonic(), time.process_time()
            held = {"run": str(run), "nearest_train_psnr": sample_and_score(run, self.root / "samples.png")}
            note.write_text(json.dumps(held))
            self._add("sample", time.monotonic() - started, time.process_time() - cpu)
        return held["nearest_train_psnr"]

    def newest(self, name: str) -> Path:
        """The newest run of one stage."""
        return sorted((self.root / "train").glob(f"{name}_*"))[-1]

    def _part(self, name: str, arguments: list[str]) -> None:
        """One command, as a process of its own, timed."""
        before, started = _children_cpu(), time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "rqvae", *arguments]
        # a part that is left alone saves and stops
        done = subprocess.run(command, env=environment, check=False, preexec_fn=_leave_with_demo)
        if done.returncode:
            raise RunFailed(f"demo: `python -m rqvae {' '.join(arguments)}` ended with exit code {done.returncode}")
        self._add(name, time.monotonic() - started, _children_cpu() - before)

    def _add(self, name: str, seconds: float, cpu_seconds: float) -> None:
        """Keep a part's cost: what a repeated call finds done costs next to nothing and is not counted again."""
        known = self.parts.get(name)
        if known is None or cpu_seconds > known["cpu_seconds"]:
            self.parts[name] = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        (self.root / "parts.json").write_text(json.dumps(self.parts, indent=1))

    def _summary(self, scores: dict[str, float]) -> dict[str, Any]:
        recon = json.loads((self.root / "recon" / "metrics.json").read_text())
        summary = {
            "stage1_psnr": recon["psnr"],
            "stage1_ssim": recon["ssim"],
            **scores,
            "cpu_seconds": round(sum(part["cpu_seconds"] for part in self.parts.values()), 1),
            "seconds": round(sum(part["seconds"] for part in self.parts.values()), 1),
            "parts": self.parts,
            "stage1_run": str(self.newest("stage1")),
            "stage2_run": str(self.newest("stage2")),
        }
        (self.root / "summary.json").write_text(json.dumps(summary, indent=1))
        return summary


def _leave_with_demo() -> None:
    die_with_parent(signal.SIGTERM)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sample_and_score(run: Path, out: Path, per_action: int = 8, seed: int = 0) -> float:
    """Draw `per_action` frames under each action, a row an action, and say how near they are to the train split.

    Returns:
        The mean over the samples of the PSNR (dB) to the most similar train frame: low when a sample is like no frame
        of the game.
    """
    import torch
    from PIL import Image

    from rqvae.configuration import read
    from rqvae.img_datasets.interfaces import ActionCondition
    from rqvae.metrics.grids import image_grid
    from rqvae.run import Stage2Run
    from rqvae.trainers.evaluation_trainer import as_pictures
    from rqvae.trainers.stage2_trainer import load_two_stage, seeded_noise

    experiment = read([run / "config.yaml"], inference=True).instantiate()
    assert isinstance(experiment, Stage2Run)
    two_stage = load_two_stage(experiment, run)
    dataset, _ = experiment.data.make("train")
    dataset.open()
    spec = dataset.spec
    actions = torch.arange(spec.num_actions).repeat_interleave(per_action)[:, None]
    condition = ActionCondition(None, actions, torch.ones_like(actions, dtype=torch.bool), spec.num_actions)
    pictures = as_pictures(two_stage.decode(two_stage.sample(condition, seeded_noise(two_stage, seed, len(actions)))))
    Image.fromarray(image_grid(pictures, columns=per_action)).save(out)
    train = torch.stack([dataset[i].require_img() for i in range(len(dataset))])
    return float(np.mean(nearest_psnr(pictures, train.numpy())))


def nearest_psnr(samples: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N,) PSNR in dB of each uint8 sample (N, 3, H, W) to its nearest uint8 frame (M, 3, H, W)."""
    nearest = []
    for sample in samples:
        squared = (frames.astype(np.int32) - sample).reshape(len(frames), -1).astype(np.float64) ** 2
        nearest.append(10 * np.log10(255**2 / max(squared.mean(1).min(), 1e-10 * 255**2)))
    return np.array(nearest)
