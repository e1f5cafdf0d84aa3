"""Record game frames with a scripted policy, or take over frames that others have recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, refuse_options


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae collect", description=__doc__)
    own.add_argument(
        "env", help="maze-chase, an environment of Gymnasium (ALE/MsPacman-v5), or a folder of PNGs with a frames.csv"
    )
    own.add_argument("--frames", type=int, default=20000, help="frames of all episodes together")
    own.add_argument("--size", type=int, default=32, help="side of a frame in pixels")
    own.add_argument(
        "--policy", default="persistent-random", help="persistent-random; in the maze also forager, mixed or all"
    )
    own.add_argument("--ghosts", type=int, default=1, help="ghosts in the maze")
    own.add_argument("--lives", type=int, default=1, help="in the maze: how often the player must be caught")
    own.add_argument("--skip", type=int, default=4, help="of Gymnasium's: frames of the emulator a step")
    own.add_argument("--max-steps", type=int, default=400, help="longest episode")
    own.add_argument("--seed", type=int, default=0, help="of the episodes, of the policy and of the splits")
    own.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the recording")
    return own


def run(arguments: Sequence[str]) -> int:
    """Record game frames with a scripted policy."""
    options = parser().parse_args(list(arguments))

    from tqdm import tqdm

    from rqvae.games.collect import MAZE, collect, import_folder

    folder = Path(options.env)
    recorded = options.env != MAZE and folder.is_dir()
    if recorded:
        names = ("frames", "policy", "ghosts", "lives", "skip", "max_steps")
        refuse_options(parser(), options, names, f"the folder {folder}")
    elif options.env == MAZE:
        refuse_options(parser(), options, ("skip",), MAZE)
    else:
        refuse_options(parser(), options, ("policy", "ghosts", "lives"), options.env)
    total = None if recorded else options.frames
    with tqdm(total=total, desc=f"collect {folder.name}", unit="frame", delay=0.2) as bar:

        def count(new: int) -> None:
            bar.update(new)

        if recorded:
            meta = import_folder(folder, options.size, options.out, seed=options.seed, progress=count)
        else:
            meta = collect(
                options.env,
                options.frames,
                options.size,
                options.out,
                seed=options.seed,
                policy=options.policy,
                num_ghosts=options.ghosts,
                lives=options.lives,
                max_steps=options.max_steps,
                skip=options.skip,
                progress=count,
            )
    sys.stdout.write(f"{options.out}: {meta['frames']} frames in {meta['episodes']} episodes\n")
    return 0
