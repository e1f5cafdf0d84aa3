"""Frames a second of `play` at batch 1 on one CPU thread: solver, steps, eager, compiled, by onnxruntime, in turn.

A tick is what the server does for a frame: noise, solver, decoder, the real game beside it; encoding of the PNG and the
socket are not in it. The model is that of configs/maze_chase/world_model.yaml with random weights, or `--model`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import save
from rqvae import backends
from rqvae.commands.options import load_world_model
from rqvae.configuration import read
from rqvae.diffusion import euler, renoise
from rqvae.games.maze_chase import MazeChase
from rqvae.models.interfaces import DataSpec
from rqvae.models.two_stage import TwoStage
from rqvae.play.onnx_runtime import use_onnx
from rqvae.play.session import Session, World
from rqvae.play.starts import starts_of_game
from rqvae.trainers.stage2_trainer import make_two_stage

CONFIG = Path(__file__).parent.parent / "configs" / "maze_chase" / "world_model.yaml"
STEPS = (2, 4, 8)


def untrained() -> TwoStage:
    """The model of the config; its last layer, which begins at zero, made random: zeros are no faster, but look odd."""
    two_stage = make_two_stage(read([CONFIG]).instantiate()).eval()
    for parameter in two_stage.stage2.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return two_stage


def session_of(two_stage: TwoStage, solver: Any, steps: int) -> Session:
    """A session of a model whose own sampler is this one."""
    shared = copy.copy(two_stage)
    shared._modules = dict(two_stage._modules)
    stage2: Any = copy.copy(two_stage.stage2)
    stage2.sampler = replace(stage2.sampler, solver=solver, steps=steps)
    shared._modules["stage2"] = stage2
    game = MazeChase(two_stage.image_shape[1])
    starts = starts_of_game(game, stage2.history)
    return Session(World(shared, len(game.action_names), game.action_names, starts, game))


def measure(sessions: dict[str, Session], rounds: int) -> dict[str, dict[str, float]]:
    """Ticks of all sessions in turn; the order turns from round to round."""
    names, seconds = list(sessions), {name: np.empty(rounds) for name in sessions}
    for i in range(rounds):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            sessions[name].press(1 + i // 4 % 4)
            started = time.perf_counter()
            sessions[name].tick()
            seconds[name][i] = time.perf_counter() - started
    rows = {}
    for name, spent in seconds.items():
        slow, fast = np.percentile(spent, [95, 5])
        rows[name] = {
            "frames_per_s": round(1 / float(np.median(spent)), 1),
            "frames_per_s_of_the_slowest_5_percent": round(1 / slow, 1),
            "frames_per_s_of_the_fastest_5_percent": round(1 / fast, 1),
            "ms": round(1e3 * float(np.median(spent)), 2),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="run folder, exported folder or shipped name")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--eager", action="store_true", help="leave the compiled arms out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    eager = load_world_model(options.model)[1] if options.model else untrained()
    arms: dict[str, Any] = {"eager": eager}
    if not options.eager:
        arms["compiled"] = copy.deepcopy(eager)
        backends.create("cpu").compile(arms["compiled"].stage2.backbone)
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        arms["onnx"] = copy.deepcopy(eager)
        shape, stage2 = eager.image_shape, eager.stage2
        names = MazeChase.action_names
        spec = DataSpec(shape, num_actions=len(names), history=stage2.history, context=True, names=names)
        use_onnx(arms["onnx"], spec, threads=1)
    sessions = {
        f"{solver.__name__}, {steps} steps, {kind}": session_of(two_stage, solver, steps)
        for kind, two_stage in arms.items()
        for solver in (euler, renoise)
        for steps in STEPS
    }
    started = time.perf_counter()
    for session in sessions.values():
        session.tick()
    first = time.perf_counter() - started
    measure(sessions, 3)
    load = round(os.getloadavg()[0], 2)
    facts = {"rounds": options.rounds, "first_ticks_s": round(first, 1), "load_before": load}
    facts["parameters"] = sum(p.numel() for p in eager.stage2.parameters())
    save("play_speed", {**facts, "ticks": measure(sessions, options.rounds)})


if __name__ == "__main__":
    main()
