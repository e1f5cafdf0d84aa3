"""Generate images with a trained Stage2 run: a folder of PNGs or an ADM .npz, and how they were made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, check_world_size
from rqvae.errors import BadInput


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae sample", description=__doc__)
    own.add_argument("run", type=Path, metavar="RUN", help="run folder")
    own.add_argument("--num", type=int, default=64)
    own.add_argument("--class", dest="labels", type=_numbers, default=(), metavar="K[,K...]", help="classes in turn")
    own.add_argument("--steps", type=int, help="solver steps; the run's own by default")
    own.add_argument("--cfg", type=float, help="scale of classifier-free guidance; the run's own by default")
    own.add_argument("--solver", help="name of a function of rqvae.diffusion.solvers")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--batch-size", type=int, default=64)
    own.add_argument("--out", type=Path, required=True, metavar="DIR|FILE.npz")
    own.add_argument("--world-size", type=int, default=1)
    own.add_argument("--backend")
    own.add_argument("--threads", type=int, default=0)
    return own


def run(arguments: Sequence[str]) -> int:
    """Generate images with a trained Stage2 run: a folder of PNGs or an ADM .npz, and how they were made."""
    options = parser().parse_args(list(arguments))

    from rqvae import backends
    from rqvae.api import change_sampler, load
    from rqvae.diffusion import solvers
    from rqvae.trainers.generate import SampleRequest, describe_source, generate

    request = SampleRequest(options.out, options.num, options.labels, options.seed, options.batch_size)
    solver = getattr(solvers, options.solver, None) if options.solver else None
    if options.solver and solver is None:
        raise BadInput(f"--solver: expected a function of rqvae.diffusion.solvers, got {options.solver}")
    if not backends.in_job() and check_world_size(options) > 1:
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
