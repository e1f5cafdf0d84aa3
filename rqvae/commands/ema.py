"""Put together an average of another length from a run's snapshots of its power-function averages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, folder_at

_ROUGH = 0.05


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae ema", description=__doc__)
    own.add_argument("run", metavar="RUN", help="run folder of either stage, or its URL, trained with ema.power")
    own.add_argument("--sigma-rel", type=float, required=True, help="relative width of the average, in (0, 0.2886]")
    own.add_argument("--step", type=int, help="step of a snapshot; the newest by default")
    own.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, which loads like a run")
    return own


def run(arguments: Sequence[str]) -> int:
    """Put together an average of another length from a run's snapshots of its power-function averages."""
    options = parser().parse_args(list(arguments))

    from rqvae.trainers.posthoc_ema import PosthocRequest, reconstruct_average

    request = PosthocRequest(folder_at(options.run, snapshots=True), options.sigma_rel, options.out, options.step)
    facts = reconstruct_average(request)
    error = facts["profile_error"]
    rough = " (rough: take snapshots more often, or a width nearer to those of ema.power)" if error > _ROUGH else ""
    sys.stdout.write(
        f"{request.out}: sigma_rel {request.sigma_rel:g} at step {facts['step']} from {facts['snapshots']} snapshots, "
        f"profile error {100 * error:.2f} %{rough}\n"
    )
    return 0
