"""Reconstruct the test split: images, grids and scores under SAVE_DIR/RUN_NAME."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae import remote
from rqvae.commands.options import Parser, add_job_options, check_world_size, config_files


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae recon", description=__doc__)
    add_job_options(own)
    own.add_argument("--ckpt", help="run or checkpoint folder, or its URL")
    own.add_argument("--compile-plan", metavar="FILE", help="compile_plan.yaml that `diagnose` wrote, for Stage1")
    own.add_argument("--no-originals", action="store_true", help="do not write originals/ beside images/")
    return own


def run(arguments: Sequence[str]) -> int:
    """Reconstruct the test split: images, grids and scores under SAVE_DIR/RUN_NAME."""
    options, overrides = parser().split(arguments)

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.reconstruct import ReconRequest, check_request, reconstruct_split

    configuration = read(config_files(options), overrides, inference=True)
    world_size, backend_name = check_world_size(options), backends.choose(options.backend)
    name = options.run_name or Path(config_files(options)[0]).stem
    request = ReconRequest(
        remote.place_of(options.save_dir) / name,
        options.ckpt,
        options.resume_ckpt,
        options.resume_wandb_id,
        compile_plan=options.compile_plan,
        originals=not options.no_originals,
    )
    if not backends.in_job():
        check_request(configuration.for_checks(), request)
        if backends.needs_launch(world_size):
            return backends.launch(["recon", *arguments], world_size, threads=options.threads, backend=options.backend)
    backend = backends.create(backend_name, threads=options.threads)
    try:
        scores = reconstruct_split(configuration.instantiate(), backend, request)
        if backend.rank == 0:
            sys.stdout.write(f"{request.folder}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()) + "\n")
    finally:
        backend.close()
    return 0
