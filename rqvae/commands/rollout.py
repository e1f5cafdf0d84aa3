"""Evaluate a world model: one step, rollouts, control, persistence, each beside what copying would score."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rqvae.commands.options import Parser, find_solver, numbers
from rqvae.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae rollout", description=__doc__)
    own.add_argument("model", metavar="RUN|NAME", help="run folder, exported folder or shipped name")
    own.add_argument("--starts", type=int, default=48, help="real windows a seed to dream on from")
    own.add_argument("--horizon", type=int, default=64, help="frames of the longest dream")
    own.add_argument("--seeds", type=numbers, default=(0, 1, 2), metavar="S[,S...]", help="of windows and noise")
    own.add_argument("--ghosts", type=int, default=1, help="ghosts in the maze")
    own.add_argument("--steps", type=int, help="solver steps; the model's own by default")
    own.add_argument("--solver", help="name of a function of rqvae.diffusion.solvers")
    own.add_argument("--batch-size", type=int, default=64, help="windows of one call of the model, on each rank")
    own.add_argument("--json", type=Path, metavar="OUT", help="write the scores as JSON")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=int, default=0, help="OpenMP threads of a process")
    return own


def run(arguments: Sequence[str]) -> int:
    """Evaluate a world model on the maze game."""
    options = parser().parse_args(list(arguments))

    from rich.console import Console
    from tqdm import tqdm

    from rqvae import backends
    from rqvae.api import change_sampler, load
    from rqvae.games.maze_chase import MazeChase
    from rqvae.trainers.dream import model_numbers
    from rqvae.trainers.rollout import Dreamer, evaluate
    from rqvae.trainers.run_folder import make_folder

    if options.json:
        make_folder(options.json.parent, "--json")
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        pipeline = load(options.model)
        if pipeline.two_stage is None or not pipeline.spec.context:
            raise BadInput(f"{options.model}: expected a world model (frames of history as condition), got another run")
        sampler = change_sampler(pipeline.two_stage, steps=options.steps, solver=find_solver(options.solver))
        game = MazeChase(pipeline.spec.image_shape[1], options.ghosts)
        with tqdm(desc="rollout", unit="frame", delay=0.5) as bar:

            def count(new: int) -> None:
                bar.update(new)

            two_stage = pipeline.two_stage.to(backend.device)
            numbers = model_numbers(pipeline.spec.names, game.action_names)
            dreamer = Dreamer(two_stage, pipeline.spec.num_actions, numbers, sampler, options.batch_size, count)
            sizes = {"starts": options.starts, "horizon": options.horizon, "seeds": options.seeds}
            scores = evaluate(dreamer, game, history=pipeline.spec.history, **sizes)
    finally:
        backend.close()
    Console().print(_table(scores))
    if options.json:
        options.json.write_text(json.dumps(scores, indent=1))
        sys.stdout.write(f"{options.json}\n")
    return 0


def _table(scores: dict[str, Any]) -> Table:
    """The scores that are read first, each beside what it is compared with."""
    from rich.table import Table

    step = scores["one_step"]
    table = Table("score", "model", "copy last frame")
    table.add_row("one step, PSNR dB", f"{step['psnr']:.2f}", f"{step['copy_last']:.2f}")
    table.add_row("one step, moving pixels, PSNR dB", f"{step['psnr_moving']:.2f}", f"{step['copy_last_moving']:.2f}")
    for h, row in scores["rollout"].items():
        copied = f"{row['copy_first']:.2f} / {row['copy_first_moving']:.2f}"
        table.add_row(f"rollout h = {h}, PSNR all / moving", f"{row['psnr']:.2f} / {row['psnr_moving']:.2f}", copied)
    for name in ("open_turns", "blocked_refused", "straight_on", "open_turns_null"):
        share = scores[name]
        table.add_row(name.replace("_", " "), "no case" if share is None else f"{share:.3f}", "")
    for name in ("player_visible", "ghosts_visible"):
        for h, share in scores[name].items():
            table.add_row(f"{name.replace('_', ' ')}, h = {h}", f"{share:.3f}", "")
    table.add_row("error of the detector on real frames", f"{scores['detector_error']:.4f}", "")
    return table
