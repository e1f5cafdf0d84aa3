"""Record a game, train both stages, dream, score and report, in about ten minutes on two cores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, thread_count


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae demo", description=__doc__)
    own.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of all that it makes")
    # at this size a second OpenMP thread costs more than it gives: 9.5 it/s against 14 with one
    own.add_argument("--threads", type=thread_count, default=1, help="OpenMP threads of each part")
    own.add_argument("--frames", type=int, default=20_000, help="frames to record")
    own.add_argument("--starts", type=int, default=24, help="real windows a seed that scored dreams begin from")
    return own


def run(arguments: Sequence[str]) -> int:
    """Record a game, train both stages, dream, score and report, in about ten minutes on two cores."""
    options, overrides = parser().split(arguments)

    from rqvae.demo import Demo

    summary = Demo(options.out, options.threads, tuple(overrides), options.frames, options.starts).run()
    for key in ("stage1_psnr", "stage1_ssim", "nearest_train_psnr", "cpu_seconds", "seconds"):
        sys.stdout.write(f"{key:20s} {summary[key]:.3f}\n")
    world = summary["world"]
    for key in ("psnr_moving", "copy_last_moving"):
        sys.stdout.write(f"{key:20s} {world['one_step'][key]:.3f}\n")
    for key in ("open_turns", "blocked_refused"):
        sys.stdout.write(f"{key:20s} {world[key]:.3f}\n" if world[key] is not None else f"{key:20s} no case\n")
    sys.stdout.write(f"report: {options.out / 'report' / 'index.html'}\n")
    return 0
