"""Write one page on the channels of tracked runs: which die, when and where, what was done, what it changed.

`report channels RUN ...` is the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, folder_at
from rqvae.errors import BadInput


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae report channels", description=__doc__)
    own.add_argument("runs", nargs="+", metavar="RUN", help="Stage1 run folders or their URLs, with tracking.enabled")
    own.add_argument("--out", type=Path, default=Path("channels.html"), metavar="FILE.html", help="the page")
    own.add_argument("--title", help="of the page; the runs' names by default")
    own.add_argument(
        "--ablation",
        type=int,
        default=16,
        metavar="N",
        help="replace each dead channel by its mean and measure the PSNR on N images of val; 0 uses what is there",
    )
    own.add_argument("--backend", help="of the ablation: a name of the README's table; RQVAE_BACKEND or automatic")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write one page on the channels of tracked runs: which die, when and where, what was done, what it changed."""
    options = parser().parse_args(list(arguments))

    from rqvae.commands.report import check_out
    from rqvae.reports.channels import write_channel_report
    from rqvae.reports.run_report import distinct_names

    check_out(options.out)
    if options.ablation < 0:
        raise BadInput(f"--ablation: expected at least 0, got {options.ablation}")
    runs = [folder_at(run) for run in options.runs]
    names = distinct_names(runs)
    if options.ablation:
        _ablate(runs, options.ablation, options.backend)
    title = options.title or (f"Channels of {names[0]}" if len(names) == 1 else f"Channels of {len(names)} runs")
    write_channel_report(options.out, title=title, runs=runs)
    sys.stdout.write(f"{options.out}: {', '.join(names)}\n")
    return 0


def _ablate(runs: Sequence[Path], images: int, name: str | None) -> None:
    """Write what each run lacks; a run whose data or weights are gone has its report without."""
    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.ablate_channels import AblationRequest, ablate

    backend = backends.create(backends.choose(name))
    try:
        for folder in runs:
            if not (folder / "channels" / "regions.json").exists():
                continue
            try:
                experiment = read([folder / "config.yaml"], inference=True).instantiate()
                ablate(experiment, backend, AblationRequest(folder, images))
            except BadInput as error:
                sys.stderr.write(f"no ablation of {folder}: {error}\n")
    finally:
        backend.close()
