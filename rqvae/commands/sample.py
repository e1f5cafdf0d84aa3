"""Generate images with a trained Stage2 run: a folder of PNGs or an ADM .npz, and how they were made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rqvae.commands.options import (
    Parser,
    check_world_size,
    find_solver,
    finite_number,
    folder_at,
    numbers,
    thread_count,
)
from rqvae.errors import BadInput

if TYPE_CHECKING:
    from rqvae.api import Pipeline


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae sample", description=__doc__)
    own.add_argument("run", metavar="RUN", help="run, checkpoint or exported folder, its URL, shipped name, or hub id")
    own.add_argument("--num", type=int, default=64, help="how many images")
    own.add_argument("--class", dest="labels", type=numbers, default=(), metavar="K[,K...]", help="classes in turn")
    own.add_argument("--masks", type=Path, metavar="DIR|FILE.png", help="masks in turn, for a generator on masks")
    own.add_argument("--steps", type=int, help="solver steps; the run's own by default")
    own.add_argument("--cfg", type=finite_number, help="scale of the run's guidance; its own by default")
    own.add_argument("--solver", help="name of a function of rqvae.diffusion.solvers")
    own.add_argument("--seed", type=int, default=0, help="of the noise; classes are taken in turn")
    own.add_argument("--batch-size", type=int, default=64, help="images of one call of the model, on each rank")
    own.add_argument("--out", type=Path, required=True, metavar="DIR|FILE.npz", help="PNGs, or one ADM .npz")
    own.add_argument("--compile-plan", metavar="FILE", help="compile_plan.yaml that `diagnose` wrote, for Stage1")
    own.add_argument("--world-size", type=int, default=1, help="processes on this host")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads of a process")
    return own


def run(arguments: Sequence[str]) -> int:
    """Generate images with a trained Stage2 run: a folder of PNGs or an ADM .npz, and how they were made."""
    options, unknown = parser().split(arguments)
    if unknown:
        raise BadInput(f"rqvae sample: unrecognized arguments: {' '.join(unknown)}")

    from rqvae import backends
    from rqvae.api import change_sampler, load
    from rqvae.trainers.generate import SampleRequest, generate
    from rqvae.trainers.parts import compile_planned

    request = SampleRequest(options.out, options.num, options.labels, options.seed, options.batch_size, options.masks)
    solver = find_solver(options.solver)
    if backends.needs_launch(check_world_size(options)):
        return backends.launch(
            ["sample", *arguments], options.world_size, threads=options.threads, backend=options.backend
        )
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        pipeline = load(options.run)
        if pipeline.two_stage is None:
            raise BadInput(f"{options.run}: expected a Stage2 run, this one is an autoencoder")
        two_stage = pipeline.two_stage.to(backend.device)
        compile_planned(two_stage.stage1, options.compile_plan, backend)
        sampler = change_sampler(two_stage, steps=options.steps, guidance=options.cfg, solver=solver)
        facts = generate(two_stage, pipeline.spec, sampler, backend, request, _source(options.run, pipeline))
        if backend.rank == 0:
            sys.stdout.write(f"{request.out}: {request.num} images, {facts['nfe']} function evaluations each\n")
    finally:
        backend.close()
    return 0


def _source(model: str, pipeline: Pipeline) -> dict[str, Any]:
    """Which weights: of a run those of its checkpoint, else what the exported folder says of itself."""
    from rqvae.trainers.generate import describe_source

    folder = folder_at(model)
    if (folder / "config.yaml").exists() or (folder / "meta.json").exists():
        return describe_source(folder)
    known = {} if pipeline.description is None else pipeline.description.source
    return {"model": model, **{key: known.get(key) for key in ("run", "step", "weights", "stage1_sha256")}}
