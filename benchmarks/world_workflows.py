"""All workflows of the world model on the same frames and budget: quality, steps, and cost of a frame.

One autoencoder (configs/maze_chase/klvae_f4.yaml) is trained first and shared; latent workflows train on its cached
latents, the pixel ones cannot. No workflow has the residual to the last frame unless --residual gives it to all that
predict x0, and none has noise on its context. Every (workflow, seed) that is done is kept in --out, so the same command
goes on. The literal row is the origin's target: a velocity in pixels, asked of a decoder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.record import save
from rqvae.api import load
from rqvae.cli import run as command
from rqvae.files import write_json
from rqvae.games.maze_chase import MazeChase
from rqvae.games.windows import maze_windows
from rqvae.metrics.moving import PixelErrors
from rqvae.metrics.reconstruction import to_uint8
from rqvae.models.two_stage import TwoStage
from rqvae.trainers.dream import Dream, frame_noise
from rqvae.trainers.dry_run import forward_cost
from rqvae.trainers.rollout import Dreamer, evaluate

HISTORY, ACTIONS = 4, 5
CAUSAL = {
    "class_path": "rqvae.models.stage2.causal_dit.CausalDiT",
    "init_args": {"width": 128, "depth": 4, "heads": 4, "temporal_heads": 4},
}
WORKFLOWS: dict[str, dict[str, Any]] = {
    "latent_concat, x0": {"workflow": "latent_concat"},
    "latent_concat, v": {"workflow": "latent_concat", "prediction": "v"},
    "latent_history, x0": {"workflow": "latent_history"},
    "latent_history, v": {"workflow": "latent_history", "prediction": "v"},
    "pixel, x0": {"workflow": "pixel"},
    "pixel, literal velocity": {"workflow": "pixel", "prediction": "velocity", "loss_space": "pixel"},
    "causal, x0": {"workflow": "causal", "backbone": CAUSAL},
}


def prepare(out: Path, frames: int, vae_steps: int) -> tuple[Path, Path, Path]:
    """The recording, the autoencoder's run, and the cache of its latents; what is there stays."""
    recording, cache = out / "frames", out / f"latents_{frames}_{vae_steps}"
    _run("collect", "maze-chase", "--frames", frames, "--policy", "mixed", "--out", recording)
    config, project = "configs/maze_chase/klvae_f4.yaml", f"vae_{frames}_{vae_steps}"
    root = ["--data.dataset.init_args.root", recording, "--data.workers", 0]
    line = ["train", config, "--save-dir", out, "--project", project, "--run-name", "vae", "--train.steps", vae_steps]
    _run(*line, *root, "--online_eval.every", "null", "--pictures.every", "null", "--threads", 1)
    vae = next((out / project).glob("vae_*"))
    _run("cache-latents", config, cache, "--ckpt", vae, *root, "--threads", 1)
    return recording, vae, cache


def config_of(name: str, recording: Path, vae: Path, cache: Path, residual: bool) -> dict[str, Any]:
    """The experiment of one workflow."""
    config = yaml.safe_load(Path("configs/maze_chase/world_model_klvae.yaml").read_text())
    config["stage1_checkpoint"] = str(vae)
    options = WORKFLOWS[name]
    x0 = options.get("prediction", "x0") == "x0"
    config["stage2"]["init_args"] |= {"context_noise": 0.0, "residual": residual and x0, **options}
    dataset = config["data"]["dataset"]["init_args"]
    dataset |= {"root": str(recording), "history": HISTORY}
    dataset |= {} if options["workflow"] == "pixel" else {"vae": str(cache)}
    config["data"]["workers"] = 0
    return config | {"pictures": {"every": None}, "logging": {"wandb": "disabled", "tensorboard": False}}


def seconds_a_step(line: list[Any], out: Path) -> float:
    """CPU seconds of a step, from the difference of a run of 30 steps and one of 10."""
    spent = []
    for steps in (10, 30):
        began = time.process_time()
        place = ["--save-dir", out / "timing", "--project", "p", "--run-name", f"t{steps}", "--fresh"]
        _run(*line, *place, "--train.steps", steps, "--checkpoint.every", steps)
        spent.append(time.process_time() - began)
    return (spent[1] - spent[0]) / 20


def train(line: list[Any], out: Path, project: str, steps: int, seed: int) -> tuple[Path, float]:
    """The run, and the CPU seconds that it took."""
    place = ["--save-dir", out, "--project", project, "--run-name", f"seed{seed}", "--fresh"]
    began = time.process_time()
    _run(*line, *place, "--train.steps", steps, "--train.seed", seed, "--checkpoint.every", steps)
    return max((out / project).glob(f"seed{seed}_*")), time.process_time() - began


@torch.no_grad()
def cost(two_stage: TwoStage, frames: int = 20) -> dict[str, float]:
    """Milliseconds of CPU and GFLOP of one played frame at batch 1, with the model's own sampler."""
    shape = (1, HISTORY, *two_stage.image_shape)
    dream = Dream.begin(two_stage, torch.rand(shape), torch.zeros(1, HISTORY - 1, dtype=torch.long), ACTIONS)
    action, times = torch.zeros(1, dtype=torch.long), []
    flops, _ = forward_cost(two_stage, lambda: dream.step(action, frame_noise(two_stage.latent_shape, 0, 0, 0)[None]))
    for t in range(frames):
        noise = frame_noise(two_stage.latent_shape, 0, 0, t)[None]
        began = time.process_time()
        dream.step(action, noise)
        times.append(time.process_time() - began)
    return {"frame_cpu_ms": 1e3 * float(np.median(times)), "frame_gflop": flops / 1e9}


@torch.no_grad()
def ceiling(two_stage: TwoStage, starts: int, seed: int) -> dict[str, float]:
    """PSNR of the autoencoder's own reconstruction of the frames that are predicted: no workflow can be better."""
    windows, errors = maze_windows(MazeChase(), starts, history=HISTORY, horizon=8, seed=seed), PixelErrors()
    for t in range(8):
        before, target = (windows.frames[:, HISTORY + t + k] for k in (-1, 0))
        images = torch.from_numpy(target).permute(0, 3, 1, 2).float() / 255
        shown = to_uint8(two_stage.reconstruct(images)).permute(0, 2, 3, 1).numpy()
        errors.update(shown, target, before)
    return {"ceiling": errors.psnr, "ceiling_moving": errors.psnr_moving}


def score(run: Path, starts: int, horizon: int) -> dict[str, float]:
    """What a run's model scores and costs."""
    two_stage = load(str(run)).two_stage
    assert two_stage is not None
    scores = evaluate(
        Dreamer(two_stage, ACTIONS), MazeChase(), history=HISTORY, starts=starts, horizon=horizon, seeds=(0,)
    )
    figures = {key: scores["one_step"][key] for key in ("psnr", "psnr_moving", "copy_last", "copy_last_moving")}
    figures |= {key: scores[key] for key in ("open_turns", "blocked_refused")}
    figures |= {f"{key}_{h}": share for key in ("player_visible", "ghosts_visible") for h, share in scores[key].items()}
    return {**figures, **ceiling(two_stage, starts, 0), **cost(two_stage)}


def measure(options: argparse.Namespace, name: str, seed: int, parts: tuple[Path, Path, Path]) -> dict[str, float]:
    """One workflow of one seed: trained, scored and kept, or read where it is there."""
    word = "".join(c if c.isalnum() else "_" for c in name)
    budget = f"{options.steps}steps" if options.steps else f"{options.cpu_seconds:g}s"
    key = f"{word}_{budget}{'_residual' * options.residual}"
    measured = f"scores_{options.frames}_{options.vae_steps}_{options.starts}_{options.horizon}"
    kept = options.out / measured / f"{key}_{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    file = options.out / f"{key}.yaml"
    file.write_text(yaml.safe_dump(config_of(name, *parts, options.residual)))
    line = ["train", file, "--threads", 1, "--logging.progress", "false"]
    steps = options.steps or max(1, round(options.cpu_seconds / seconds_a_step(line, options.out)))
    run, spent = train(line, options.out, key, steps, seed)
    figures = {"steps": steps, "train_cpu_s": spent, **score(run, options.starts, options.horizon)}
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, figures)
    return figures


def summary(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each figure: the mean over seeds, the least and the most."""
    table = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        spread = (float(np.mean(values)), min(values), max(values)) if values else ()
        table[key] = [round(x, 3) for x in spread]
    return table


def markdown(figures: dict[str, dict[str, list[float]]]) -> str:
    """The table that is read: means over seeds, best PSNR first."""
    lines = ["| workflow | PSNR all / moving | open turns | steps | CPU ms a frame | GFLOP a frame |", "|" + "---|" * 6]
    for name, row in sorted(figures.items(), key=lambda item: -item[1]["psnr"][0]):
        value = {key: (spread[0] if spread else float("nan")) for key, spread in row.items()}
        lines.append(
            f"| {name} | {value['psnr']:.1f} / {value['psnr_moving']:.1f} | {value['open_turns']:.2f} "
            f"| {value['steps']:.0f} | {value['frame_cpu_ms']:.1f} | {value['frame_gflop']:.2f} |"
        )
    first = next(iter(figures.values()))
    for name, key in (("copy last frame", "copy_last"), ("autoencoder's ceiling", "ceiling")):
        lines.append(f"| {name} | {first[key][0]:.1f} / {first[key + '_moving'][0]:.1f} | | | | |")
    return "\n".join(lines)


def _run(*words: Any) -> None:
    code = command([str(word) for word in words])
    if code:
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, default=0, help="optimizer steps of every workflow")
    budget.add_argument("--cpu-seconds", type=float, default=0.0, help="CPU seconds of every workflow's training")
    parser.add_argument("--out", type=Path, default=Path("runs/world_workflows"))
    parser.add_argument("--frames", type=int, default=30000)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=48)
    parser.add_argument("--horizon", type=int, default=16)
    parser.add_argument("--residual", action="store_true", help="add the last frame to the answer where that is x0")
    parser.add_argument(
        "--only", choices=sorted(WORKFLOWS), action="append", help="one workflow, of which nothing is saved; repeatable"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    parts = prepare(options.out, options.frames, options.vae_steps)
    figures = {
        name: summary([measure(options, name, seed, parts) for seed in range(options.seeds)])
        for name in options.only or WORKFLOWS
    }
    if not options.only:
        save("world_workflows", figures)
    print(markdown(figures))


if __name__ == "__main__":
    main()
