"""Reconstruct the test split: images, grids and scores under SAVE_DIR/RUN_NAME."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, add_job_options, check_world_size, config_files


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae recon", description=__doc__)
    add_job_options(own)
    own.add_argument("--ckpt", help="run or checkpoint folder")
    own.add_argument("--compile-plan", metavar="FILE", help="compile_plan.yaml that `diagnose` wrote, for Stage1")
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
        Path(options.save_dir) / name,
        options.ckpt,
        options.resume_ckpt,
        options.resume_wandb_id,
        compile_plan=options.compile_plan,
    )
    if not backends.in_job():
        check_request(configuration.for_checks(), request)
        if world_size > 1:
            return backends.launch(["recon", *arguments], world_size, threads=options.threads, backend=options.backend)
    backend = backends.create(backend_name, threads=options.threads)
    try:
        scores = reconstruct_split(configuration.instantiate(), backend, request)
        if backend.rank == 0:
            sys.stdout.write(f"{request.folder}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()) + "\n")
    finally:
        backend.close()
    return 0
