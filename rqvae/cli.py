"""The command line: the only place where results become text on a screen.

Exit codes: 0 done, 1 a gate that was asked for failed, 2 bad input, 3 the run failed, 130/143 interrupted after a
checkpoint.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rqvae.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from rqvae.run import AnyRun

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": train,
        "recon": recon,
        "sample": sample,
        "collect": collect,
        "demo": demo,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: python -m rqvae {{{','.join(commands)}}} ... (COMMAND --help tells more)\n")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        return _fail(f"unknown command {name}; expected one of {', '.join(commands)}", 2)
    try:
        return commands[name](rest)
    except BadInput as error:
        return _fail(str(error), 2)
    except RunFailed as error:
        return _fail(str(error), 3)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        if error.errno not in _FULL:
            traceback.print_exc()
            return _fail(str(error), 3)
        return _fail(f"{error.filename or 'the run'}: the disk is full; earlier checkpoints are untouched", 3)
    except Exception as error:  # noqa: BLE001  (a defect of ours: shown whole, and the code says that the run failed)
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}", 3)


def _fail(message: str, code: int) -> int:
    """Say why, once: a rank of our launcher leaves the words to it."""
    line = " ".join(message.split())
    if folder := os.environ.get("RQVAE_ERROR_DIR"):
        Path(folder, f"rank_{os.environ.get('RANK', '0')}").write_text(f"{code} {line}")
    else:
        sys.stderr.write(f"error: {line}\n")
    return code


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are BadInput, and whose options may be spelt with _ or -."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise BadInput(f"{self.prog}: {message}")

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """This command's own arguments, and the config overrides (`--train.steps 20`, `--train.steps=20`)."""
        own: list[str] = []
        overrides: list[str] = []
        tokens = [t for t in arguments if t != "--"]
        while tokens:
            token = tokens.pop(0)
            name, equals, value = token.partition("=")
            known = name.replace("_", "-") if name.startswith("--") else name
            if not name.startswith("--") or known in self._option_string_actions:
                own.append(known + equals + value if name.startswith("--") else token)
                action = self._option_string_actions.get(known)
                if action is not None and action.nargs != 0 and not equals and tokens:
                    own.append(tokens.pop(0))
                continue
            overrides.append(token)
            if not equals and tokens and not tokens[0].startswith("--"):
                overrides.append(tokens.pop(0))
        return self.parse_args(own), overrides


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text}")
    return text.lower() == "true"


def _job_options(parser: _Parser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML files, later ones over earlier ones")
    parser.add_argument("--config", action="append", default=[], help="the same as CONFIG")
    parser.add_argument("--save-dir", default="runs", metavar="SAVE_DIR", help="folder of all runs")
    parser.add_argument("--run-name", metavar="RUN_NAME", help="name of the run; the first config's name by default")
    parser.add_argument("--world-size", type=int, default=1, help="processes on this host")
    parser.add_argument("--resume-ckpt", help="run or checkpoint folder to start from, with its full state")
    parser.add_argument("--resume-wandb-id", help="Weights & Biases id to go on with")
    parser.add_argument("--backend", help="cpu or cuda; RQVAE_BACKEND or automatic by default")
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads of a process")


def _files(options: argparse.Namespace) -> list[str]:
    return [*options.configs, *options.config]


def _world_size(options: argparse.Namespace) -> int:
    if options.world_size < 1:
        raise BadInput(f"WORLD_SIZE: expected at least 1, got {options.world_size}")
    return options.world_size


def train(arguments: Sequence[str]) -> int:
    """Train Stage1, or Stage2 where the config has a section `stage2`."""
    every_key = "Every key of the config is an option too (--train.steps 20k); --print-config lists them."
    parser = _Parser("rqvae train", description=train.__doc__, epilog=every_key)
    _job_options(parser)
    parser.add_argument("--project", default="rqvae", help="folder below SAVE_DIR and W&B project")
    parser.add_argument("--fresh", action="store_true", help="start a new run, do not go on with an earlier one")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="refuse a config of the other stage")
    parser.add_argument("--do-online-eval", type=_yes, default=True, metavar="True|False", help="score while training")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="print shapes, parameters, operations, memory and exit")
    parser.add_argument("--json", type=Path, metavar="OUT", help="with --dry-run: write it as JSON too")
    options, overrides = parser.split(arguments)

    import yaml

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.assembly import TrainingJob, TrainRequest, check
    from rqvae.trainers.run_folder import RunPlace

    if options.threads:
        overrides += ["--train.threads", str(options.threads)]
    configuration = read(_files(options), overrides)
    if options.stage and options.stage != configuration.stage:
        raise BadInput(
            f"{_files(options)[0]}: expected a config of stage {options.stage}, got stage {configuration.stage}"
        )
    if options.print_config:
        sys.stdout.write(yaml.safe_dump(configuration.resolved, sort_keys=False))
        return 0
    if options.dry_run:
        return _dry_run(configuration.instantiate("meta"), options.json)
    world_size, backend_name = _world_size(options), backends.choose(options.backend)
    name = options.run_name or Path(_files(options)[0]).stem
    place = RunPlace(Path(options.save_dir), options.project, name)
    if not backends.in_job():
        check(configuration.for_checks(), world_size)
        place.check_writable()
        if world_size > 1:
            return backends.launch(["train", *arguments], world_size, threads=options.threads)
    settings = configuration.resolved["train"]
    backend = backends.create(backend_name, precision=settings["precision"], threads=settings["threads"])
    try:
        request = TrainRequest(
            place, options.resume_ckpt, options.resume_wandb_id, options.fresh, options.do_online_eval
        )
        return TrainingJob(configuration.instantiate(), configuration.resolved, backend, request).execute()
    finally:
        backend.close()


def _dry_run(run: AnyRun, out: Path | None) -> int:
    from rich.console import Console
    from rich.table import Table

    from rqvae.trainers.assembly import check
    from rqvae.trainers.dry_run import dry_run
    from rqvae.trainers.run_folder import make_folder

    check(run, 1)
    if out:
        make_folder(out.parent, "--json")
    facts = dry_run(run)
    table = Table("of", "part", "value", title=f"Stage {run.stage}, one image")
    for name, shape in facts["shapes"].items():
        table.add_row("shape", name, " x ".join(map(str, shape)))
    for name, count in facts["parameters"].items():
        table.add_row("parameters", name, f"{count['total']:,} ({count['trainable']:,} trainable)")
    for name, value in facts["gflops_forward"].items():
        table.add_row("forward of one image", name, f"{value:,.3f} GFLOP = {value / 2:,.3f} G multiply-adds")
    for name, value in facts["memory_gib"].items():
        table.add_row("memory", name, f"{value:,.3f} GiB")
    Console().print(table)
    if out:
        out.write_text(json.dumps(facts, indent=1))
    return 0


def recon(arguments: Sequence[str]) -> int:
    """Reconstruct the test split: images, grids and scores under SAVE_DIR/RUN_NAME."""
    parser = _Parser("rqvae recon", description=recon.__doc__)
    _job_options(parser)
    parser.add_argument("--ckpt", help="run or checkpoint folder")
    options, overrides = parser.split(arguments)

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.reconstruct import ReconRequest, check_request, reconstruct_split

    configuration = read(_files(options), overrides, inference=True)
    world_size, backend_name = _world_size(options), backends.choose(options.backend)
    name = options.run_name or Path(_files(options)[0]).stem
    request = ReconRequest(Path(options.save_dir) / name, options.ckpt, options.resume_ckpt, options.resume_wandb_id)
    if not backends.in_job():
        check_request(configuration.for_checks(), request)
        if world_size > 1:
            return backends.launch(["recon", *arguments], world_size, threads=options.threads)
    backend = backends.create(backend_name, threads=options.threads)
    try:
        scores = reconstruct_split(configuration.instantiate(), backend, request)
        if backend.rank == 0:
            sys.stdout.write(f"{request.folder}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()) + "\n")
    finally:
        backend.close()
    return 0


def sample(arguments: Sequence[str]) -> int:
    """Generate images with a trained Stage2 run: a folder of PNGs or an ADM .npz, and how they were made."""
    parser = _Parser("rqvae sample", description=sample.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--class", dest="labels", type=_numbers, default=(), metavar="K[,K...]", help="classes in turn")
    parser.add_argument("--steps", type=int, help="solver steps; the run's own by default")
    parser.add_argument("--cfg", type=float, help="scale of classifier-free guidance; the run's own by default")
    parser.add_argument("--solver", help="name of a function of rqvae.diffusion.solvers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR|FILE.npz")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--backend")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(list(arguments))

    from rqvae import backends
    from rqvae.api import change_sampler, load
    from rqvae.diffusion import solvers
    from rqvae.trainers.generate import SampleRequest, describe_source, generate

    request = SampleRequest(options.out, options.num, options.labels, options.seed, options.batch_size)
    solver = getattr(solvers, options.solver, None) if options.solver else None
    if options.solver and solver is None:
        raise BadInput(f"--solver: expected a function of rqvae.diffusion.solvers, got {options.solver}")
    if not backends.in_job() and _world_size(options) > 1:
        return backends.launch(["sample", *arguments], options.world_size, threads=options.threads)
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        pipeline = load(options.run)
        if pipeline.two_stage is None:
            raise BadInput(f"{options.run}: expected a Stage2 run, this one is an autoencoder")
        two_stage = pipeline.two_stage.to(backend.device)
        sampler = change_sampler(two_stage, steps=options.steps, guidance=options.cfg, solver=solver)
        facts = generate(two_stage, pipeline.spec, sampler, backend, request, describe_source(options.run))
        if backend.rank == 0:
            sys.stdout.write(f"{request.out}: {request.num} images, {facts['nfe']} function evaluations each\n")
    finally:
        backend.close()
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,3, got {text}") from None


def collect(arguments: Sequence[str]) -> int:
    """Record game frames with a scripted policy."""
    parser = _Parser("rqvae collect", description=collect.__doc__)
    parser.add_argument("env", help="maze-chase")
    parser.add_argument("--frames", type=int, default=20000)
    parser.add_argument("--size", type=int, default=32, help="side of a frame in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    options = parser.parse_args(list(arguments))

    from tqdm import tqdm

    from rqvae.games.collect import collect as record

    with tqdm(total=options.frames, desc=f"collect {options.env}", unit="frame", delay=0.2) as bar:

        def count(new: int) -> None:
            bar.update(new)

        meta = record(options.env, options.frames, options.size, options.out, seed=options.seed, progress=count)
    sys.stdout.write(f"{options.out}: {meta['frames']} frames in {meta['episodes']} episodes\n")
    return 0


def demo(arguments: Sequence[str]) -> int:
    """Record, train both stages, sample, score and report, in about ten minutes on two cores."""
    parser = _Parser("rqvae demo", description=demo.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    # at this size a second OpenMP thread costs more than it gives: 9.5 it/s against 14 with one
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each part")
    parser.add_argument("--frames", type=int, default=20_000, help="frames to record")
    options, overrides = parser.split(arguments)

    from rqvae.demo import Demo

    summary = Demo(options.out, options.threads, tuple(overrides), options.frames).run()
    for key in ("stage1_psnr", "stage1_ssim", "nearest_train_psnr", "cpu_seconds", "seconds"):
        sys.stdout.write(f"{key:20s} {summary[key]:.3f}\n")
    sys.stdout.write(f"report: {options.out / 'report' / 'index.html'}\n")
    return 0
