"""Evaluate a world model: one step, rollouts, control, persistence, each beside what copying would score."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rqvae.commands.options import (
    Parser,
    find_solver,
    load_world_model,
    numbers,
    open_recording,
    refuse_options,
    thread_count,
)
from rqvae.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from rqvae.diffusion.sampling import Sampler
    from rqvae.img_datasets.interfaces import DataSpec
    from rqvae.models.two_stage import TwoStage
    from rqvae.trainers.rollout import Rollout
    from rqvae.trainers.rollout_scores import Networks


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae rollout", description=__doc__)
    own.add_argument("model", metavar="RUN|NAME", help="run folder, exported folder or shipped name")
    own.add_argument(
        "--recording", metavar="DIR", help="begin from its test split, not from the maze: scores of frames"
    )
    own.add_argument("--starts", type=int, default=48, help="real windows a seed to dream on from")
    own.add_argument("--horizon", type=int, default=64, help="frames of the longest dream")
    own.add_argument("--seeds", type=numbers, default=(0, 1, 2), metavar="S[,S...]", help="of windows and noise")
    own.add_argument("--ghosts", type=int, default=1, help="ghosts in the maze: as many as the recording had")
    own.add_argument("--steps", type=int, help="solver steps; the model's own by default")
    own.add_argument("--solver", help="name of a function of rqvae.diffusion.solvers")
    own.add_argument("--batch-size", type=int, default=64, help="dreams at once; of no effect on the frames")
    own.add_argument("--json", type=Path, metavar="OUT", help="write the scores as JSON")
    own.add_argument("--html", type=Path, metavar="OUT", help="write a page: scores, curves, grids, dreams that move")
    own.add_argument("--lpips-weights", metavar="FILE|URL", help="AlexNet of torchvision; adds LPIPS")
    own.add_argument("--extractor", help="inception, random-vgg16 or a class path; adds a Fréchet distance of frames")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads of a process")
    return own


def run(arguments: Sequence[str]) -> int:
    """Evaluate a world model on the maze game, or on a recording."""
    options = parser().parse_args(list(arguments))

    if options.recording:
        refuse_options(parser(), options, ("ghosts",), f"--recording {options.recording}")

    from rich.console import Console
    from tqdm import tqdm

    from rqvae import backends
    from rqvae.api import change_sampler
    from rqvae.trainers.generate import sampler_facts
    from rqvae.trainers.run_folder import make_folder

    for name, out in (("--json", options.json), ("--html", options.html)):
        if out:
            make_folder(out.parent, name)
    networks = _networks(options.lpips_weights, options.extractor)
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    shown: list[Rollout] = []
    try:
        spec, two_stage = load_world_model(options.model)
        two_stage.to(backend.device)
        sampler = change_sampler(two_stage, steps=options.steps, solver=find_solver(options.solver))
        with tqdm(desc="rollout", unit="frame", delay=0.5) as bar:

            def count(new: int) -> None:
                bar.update(new)

            judge = _on_recording if options.recording else _on_maze
            scores = judge(options, spec, two_stage, sampler, count)(
                history=spec.history,
                starts=options.starts,
                horizon=options.horizon,
                seeds=options.seeds,
                networks=networks,
                look=shown.append,
            )
    finally:
        backend.close()
    scores["protocol"] |= sampler_facts(sampler)
    Console().print(_table(scores))
    if options.json:
        write_whole(options.json, json.dumps(scores, indent=1, allow_nan=False))
        sys.stdout.write(f"{options.json}\n")
    if options.html:
        sys.stdout.write(f"{_write_page(options, scores, shown[0])}\n")
    return 0


Judge = Callable[..., dict[str, Any]]


def _on_maze(
    options: argparse.Namespace, spec: DataSpec, two_stage: TwoStage, sampler: Sampler, count: Callable[[int], None]
) -> Judge:
    """The evaluation on our own game, which can be forked, looked into and played again."""
    from rqvae.games.maze_chase import MazeChase
    from rqvae.trainers.dream import model_numbers
    from rqvae.trainers.rollout import Dreamer, evaluate

    game = MazeChase(spec.image_shape[1], options.ghosts)
    numbers = model_numbers(spec.names, game.action_names)
    return partial(evaluate, Dreamer(two_stage, spec.num_actions, numbers, sampler, options.batch_size, count), game)


def _on_recording(
    options: argparse.Namespace, spec: DataSpec, two_stage: TwoStage, sampler: Sampler, count: Callable[[int], None]
) -> Judge:
    """The evaluation on the test split of a recording; its mean frame is the train split's."""
    from rqvae.trainers.rollout import Dreamer, evaluate_recording

    train, test = (open_recording(options.recording, spec, split) for split in ("train", "test"))
    dreamer = Dreamer(two_stage, spec.num_actions, None, sampler, options.batch_size, count)
    return partial(evaluate_recording, dreamer, test, train.mean_frame())


def _networks(lpips_weights: str | None, extractor: str | None) -> Networks:
    """The networks that are asked for, loaded before anything is dreamed."""
    from rqvae.metrics.extractors import make_extractor
    from rqvae.metrics.perceptual import LPIPSScore
    from rqvae.trainers.rollout_scores import Networks

    lpips, features = None, None
    if lpips_weights:
        lpips = LPIPSScore(trunk_weights=lpips_weights)
        lpips.fetch()
        lpips.load()
    if extractor:
        features = make_extractor(extractor)
        features.fetch()
        features.load()
    return Networks(lpips, features)


def _write_page(options: argparse.Namespace, scores: dict[str, Any], rollout: Rollout) -> Path:
    from rqvae.reports.rollout import RolloutPictures, write_rollout_page

    pictures = RolloutPictures(rollout.windows.context, rollout.windows.future, rollout.dreams)
    facts: dict[str, Any] = {"model": options.model}
    facts |= {"recording": options.recording} if options.recording else {"ghosts": options.ghosts}
    return write_rollout_page(options.html, Path(options.model).name, scores, pictures, facts)


def _table(scores: dict[str, Any]) -> Table:
    """The scores that are read first, each beside what it is compared with."""
    from rich.table import Table

    columns = ("copy_last", "mean_frame", "rerun")
    table = Table("score (frames: PSNR in dB)", "model", "copy last", "mean frame", "game again")
    rows = {"one step": scores["one_step"]}
    rows |= {f"h = {h}": _as_one_step(row) for h, row in scores["rollout"].items()}
    for when, row in rows.items():
        table.add_row(f"{when}, all pixels", *(_number(row.get(key)) for key in ("psnr", *columns)))
        moving = ("psnr_moving", *(f"{key}_moving" for key in columns))
        table.add_row(f"{when}, moving pixels", *(_number(row.get(key)) for key in moving))
    control = (
        "open_turns",
        "blocked_refused",
        "straight_on",
        "open_turns_null",
        "open_turns_all",
        "blocked_refused_all",
    )
    for name in (name for name in control if name in scores):
        shown = "no case" if scores[name] is None else f"{scores[name]:.3f}"
        again = _number(scores[f"{name}_rerun"], 3) if f"{name}_rerun" in scores else ""
        table.add_row(name.replace("_", " "), shown, "", "", again)
    for name in ("player_visible", "ghosts_visible"):
        for h, share in scores.get(name, {}).items():
            again = _number(scores[f"{name}_rerun"][h], 3)
            table.add_row(f"{name.replace('_', ' ')}, h = {h}", f"{share:.3f}", "", "", again)
    for name, distance in scores.get("frechet", {}).items():
        table.add_row(name, _number(distance, 4))
    if "detector_error" in scores:
        table.add_row("error of the detector on real frames", f"{scores['detector_error']:.4f}")
    return table


def _as_one_step(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the rollout under the names of the one-step scores."""
    return {key.replace("copy_first", "copy_last"): value for key, value in row.items()}


def _number(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
