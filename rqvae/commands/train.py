"""Train Stage1, or Stage2 where the config has a section `stage2`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rqvae.commands.options import Parser, add_job_options, check_world_size, config_files, yes
from rqvae.errors import BadInput

if TYPE_CHECKING:
    from rqvae.run import AnyRun


def parser() -> Parser:
    """The options of this command."""
    every_key = "Every key of the config is an option too (--train.steps 20k); --print-config lists them."
    own = Parser("rqvae train", description=__doc__, epilog=every_key)
    add_job_options(own)
    own.add_argument("--compile-plan", metavar="FILE", help="the same as --train.compile_plan FILE")
    own.add_argument("--project", default="rqvae", help="folder below SAVE_DIR and W&B project")
    own.add_argument("--fresh", action="store_true", help="start a new run, do not go on with an earlier one")
    own.add_argument("--stage", type=int, choices=(1, 2), help="refuse a config of the other stage")
    own.add_argument("--do-online-eval", type=yes, default=True, metavar="True|False", help="score while training")
    own.add_argument(
        "--fid-gt-act-path", metavar="NPZ", help="compare scored images with it: the key online_eval.reference"
    )
    own.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    own.add_argument("--dry-run", action="store_true", help="print shapes, parameters, operations, memory and exit")
    own.add_argument("--json", type=Path, metavar="OUT", help="with --dry-run: write it as JSON too")
    return own


def run(arguments: Sequence[str]) -> int:
    """Train Stage1, or Stage2 where the config has a section `stage2`."""
    options, overrides = parser().split(arguments)

    import yaml

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.assembly import TrainingJob, TrainRequest, check
    from rqvae.trainers.run_folder import RunPlace

    if options.threads:
        overrides += ["--train.threads", str(options.threads)]
    if options.fid_gt_act_path:
        overrides += ["--online_eval.reference", options.fid_gt_act_path]
    if options.compile_plan:
        overrides += ["--train.compile_plan", options.compile_plan]
    configuration = read(config_files(options), overrides)
    if options.stage and options.stage != configuration.stage:
        raise BadInput(
            f"{config_files(options)[0]}: expected a config of stage {options.stage}, got stage {configuration.stage}"
        )
    if options.print_config:
        sys.stdout.write(yaml.safe_dump(configuration.resolved, sort_keys=False))
        return 0
    if options.dry_run:
        return _dry_run(configuration.instantiate("meta"), options.json)
    world_size, backend_name = check_world_size(options), backends.choose(options.backend)
    name = options.run_name or Path(config_files(options)[0]).stem
    place = RunPlace.at(options.save_dir, options.project, name)
    if not backends.in_job():
        check(configuration.for_checks(), backends.job_size(world_size))
        place.check_writable()
        if backends.needs_launch(world_size):
            return backends.launch(["train", *arguments], world_size, threads=options.threads, backend=options.backend)
    settings = configuration.resolved["train"]
    backend = backends.create(backend_name, precision=settings["precision"], threads=settings["threads"])
    try:
        request = TrainRequest(
            place, options.resume_ckpt, options.resume_wandb_id, options.fresh, options.do_online_eval
        )
        return TrainingJob(configuration.instantiate(), configuration.resolved, backend, request).execute()
    finally:
        backend.close()


def _dry_run(experiment: AnyRun, out: Path | None) -> int:
    from rich.console import Console
    from rich.table import Table

    from rqvae.trainers.assembly import check
    from rqvae.trainers.dry_run import dry_run
    from rqvae.trainers.run_folder import make_folder

    check(experiment, 1)
    if out:
        make_folder(out.parent, "--json")
    facts = dry_run(experiment)
    table = Table("of", "part", "value", title=f"Stage {experiment.stage}, one image")
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
