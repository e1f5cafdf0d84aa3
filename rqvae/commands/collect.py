"""Record game frames with a scripted policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae collect", description=__doc__)
    own.add_argument("env", help="maze-chase")
    own.add_argument("--frames", type=int, default=20000, help="frames of all episodes together")
    own.add_argument("--size", type=int, default=32, help="side of a frame in pixels")
    own.add_argument("--policy", default="persistent-random", help="persistent-random, forager or mixed")
    own.add_argument("--ghosts", type=int, default=1, help="ghosts in the maze")
    own.add_argument("--seed", type=int, default=0, help="of the mazes and of the policy")
    own.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the recording")
    return own


def run(arguments: Sequence[str]) -> int:
    """Record game frames with a scripted policy."""
    options = parser().parse_args(list(arguments))

    from tqdm import tqdm

    from rqvae.games.collect import collect as record

    with tqdm(total=options.frames, desc=f"collect {options.env}", unit="frame", delay=0.2) as bar:

        def count(new: int) -> None:
            bar.update(new)

        meta = record(
            options.env,
            options.frames,
            options.size,
            options.out,
            seed=options.seed,
            policy=options.policy,
            num_ghosts=options.ghosts,
            progress=count,
        )
    sys.stdout.write(f"{options.out}: {meta['frames']} frames in {meta['episodes']} episodes\n")
    return 0
