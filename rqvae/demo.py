"""`python -m rqvae demo`: the whole way on a laptop, by the same commands that a user types.

Record a maze game, train the autoencoder, reconstruct the test split, keep the latents, train the model of the next
frame on them, score its dreams beside the real game, show some, report.
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
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.errors import RunFailed
from rqvae.files import read_json, write_json, write_whole
from rqvae.processes import die_with_parent
from rqvae.reports.demo import write_demo_report

CONFIGS = Path(__file__).parent.parent / "configs" / "maze_chase"
FRAMES, SIZE = 20_000, 32
STEPS = 2000
"""Of the world model, whose config is made for a longer training."""
SHOWN = 4
"""Dreams of the film."""
_AT_ONCE = 2000
"""Frames that are compared in one product; 50 MB."""
SCORES = ("one_step", "open_turns", "blocked_refused", "player_visible", "ghosts_visible", "detector_error")
"""What summary.json takes from the evaluation."""


@dataclass
class Demo:
    """The demo's folder and its parts.

    Args:
        root: for example runs/demo.
        threads: OpenMP threads of each part, 0 to leave torch's choice.
        overrides: config overrides of both trainings, for a shorter demo.
        frames: how many to record.
        starts: real windows, for each of three seeds, from which the dreams that are scored begin.
    """

    root: Path
    threads: int = 0
    overrides: tuple[str, ...] = ()
    frames: int = FRAMES
    starts: int = 24
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns the summary that is also written to summary.json."""
        from rqvae.trainers.run_folder import make_folder

        make_folder(self.root, "--out")
        times = self.root / "parts.json"
        self.parts = read_json(times, "remove it") if times.exists() else {}
        frames = self.root / "frames"
        data = ["--data.dataset.init_args.root", str(frames)]
        record = ["collect", "maze-chase", "--frames", str(self.frames), "--size", str(SIZE), "--out", str(frames)]
        self._part("collect", record)
        config = str(CONFIGS / "klvae_f4.yaml")
        self._part("stage1", [*self._train(1), config, *data, *self.overrides])
        stage1 = self.newest("stage1")
        place = ["--save-dir", str(self.root), "--run-name", "recon", "--ckpt", str(stage1)]
        self._part("recon", ["recon", *place, *self._threads, config, *data])
        config = str(CONFIGS / "world_model_klvae.yaml")
        data += ["--stage1_checkpoint", str(stage1), "--train.steps", str(STEPS), "--checkpoint.every", "500"]
        data += ["--ema.decays", "[0.99]", *self.overrides]
        latents = self.root / "latents" / stage1.name
        self._part("latents", ["cache-latents", config, str(latents), *self._threads, *data])
        self._part("stage2", [*self._train(2), config, *data, "--data.dataset.init_args.vae", str(latents)])
        summary = self._summary({"nearest_train_psnr": self._judge()})
        write_demo_report(self.root)
        return summary

    @property
    def _threads(self) -> list[str]:
        return ["--threads", str(self.threads)] if self.threads else []

    def _train(self, stage: int) -> list[str]:
        place = ["--save-dir", str(self.root), "--project", "train", "--run-name", f"stage{stage}"]
        return ["train", *place, *self._threads, "--stage", str(stage)]

    def _judge(self) -> float:
        """Score the newest world model's dreams and show some; an earlier call's score where the model is the same."""
        run, note = self.newest("stage2"), self.root / "samples.json"
        held = read_json(note, "remove it") if note.exists() else {}
        known = {"run": str(run), "starts": self.starts}
        if any(held.get(key) != value for key, value in known.items()) or not (self.root / "rollout.json").exists():
            import torch

            out = ["--json", str(self.root / "rollout.json"), "--html", str(self.root / "rollout.html")]
            self._part("rollout", ["rollout", str(run), *out, "--starts", str(self.starts), *self._threads])
            torch.set_num_threads(self.threads or torch.get_num_threads())
            started, cpu = time.monotonic(), time.process_time()
            held = {**known, "nearest_train_psnr": dream_and_score(run, self.root)}
            write_json(note, held)
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
        write_json(self.root / "parts.json", self.parts)

    def _summary(self, scores: dict[str, float]) -> dict[str, Any]:
        recon = json.loads((self.root / "recon" / "metrics.json").read_text())
        world = json.loads((self.root / "rollout.json").read_text())
        summary = {
            "stage1_psnr": recon["psnr"],
            "stage1_ssim": recon["ssim"],
            **scores,
            "world": {key: world[key] for key in SCORES},
            "cpu_seconds": round(sum(part["cpu_seconds"] for part in self.parts.values()), 1),
            "seconds": round(sum(part["seconds"] for part in self.parts.values()), 1),
            "parts": self.parts,
            "stage1_run": str(self.newest("stage1")),
            "stage2_run": str(self.newest("stage2")),
        }
        write_json(self.root / "summary.json", summary)
        return summary


def _leave_with_demo() -> None:
    die_with_parent(signal.SIGTERM)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def dream_and_score(run: Path, root: Path, starts: int = 8, seed: int = 0) -> float:
    """Dream from real windows: samples.png, one row an action that is held for three frames; dream.gif, four dreams.

    Returns:
        The mean over the samples of the PSNR (dB) to the most similar train frame: low when a sample is like no frame
        of the game.
    """
    from PIL import Image

    from rqvae.api import load
    from rqvae.configuration import read
    from rqvae.games.maze_chase import MazeChase
    from rqvae.games.windows import maze_windows
    from rqvae.img_datasets.game_frames import GameFrames
    from rqvae.metrics.animations import beside, gif_bytes
    from rqvae.metrics.grids import image_grid
    from rqvae.trainers.dream import model_numbers
    from rqvae.trainers.rollout import Dreamer
    from rqvae.trainers.rollout_control import HELD

    pipeline = load(str(run))
    assert pipeline.two_stage is not None
    spec, game = pipeline.spec, MazeChase(SIZE, num_ghosts=1)
    dreamer = Dreamer(pipeline.two_stage, spec.num_actions, model_numbers(spec.names, game.action_names))
    windows = maze_windows(game, starts, history=spec.history, horizon=64, seed=seed)
    past, ahead = np.split(windows.actions, [spec.history - 1], axis=1)
    held = [np.full((starts, HELD), action) for action in range(spec.num_actions)]
    pictures = np.concatenate([dreamer(windows.context, past, actions, seed)[:, -1] for actions in held])
    pictures = pictures.transpose(0, 3, 1, 2)
    Image.fromarray(image_grid(pictures, columns=starts)).save(root / "samples.png")
    shown = slice(0, SHOWN)
    dreams = dreamer(windows.context[shown], past[shown], ahead[shown], seed)
    pairs = [beside(dream, real) for dream, real in zip(dreams, windows.future, strict=False)]
    film = reduce(lambda left, right: beside(left, right, gap=8), pairs)
    write_whole(root / "dream.gif", gif_bytes(film, fps=8, scale=2))
    dataset, _ = read([run / "config.yaml"], inference=True).instantiate().data.make("train")
    assert isinstance(dataset, GameFrames)
    dataset.open()
    frames = np.concatenate([dataset.episode(k)[0] for k in range(dataset.episodes)]).transpose(0, 3, 1, 2)
    return float(np.mean(nearest_psnr(pictures, frames)))


def nearest_psnr(samples: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N,) PSNR in dB of each uint8 sample (N, 3, H, W) to its nearest uint8 frame (M, 3, H, W)."""
    flat_sd = samples.reshape(len(samples), -1).astype(np.float64)
    least_s = np.full(len(samples), np.inf)
    for start in range(0, len(frames), _AT_ONCE):
        flat_md = frames[start : start + _AT_ONCE].reshape(-1, flat_sd.shape[1]).astype(np.float64)
        # whole numbers below 2^53: the products are exact
        squared_ms = (flat_md**2).sum(1)[:, None] - 2 * flat_md @ flat_sd.T + (flat_sd**2).sum(1)
        least_s = np.minimum(least_s, squared_ms.min(0))
    return np.asarray(10 * np.log10(255**2 / np.maximum(least_s / flat_sd.shape[1], 1e-10 * 255**2)))
