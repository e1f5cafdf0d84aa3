"""Write a checkpoint of `train.parallel: sharded` as one of whole safetensors files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae consolidate", description=__doc__)
    own.add_argument("source", type=Path, metavar="RUN", help="run folder (its newest checkpoint) or checkpoint folder")
    own.add_argument("out", type=Path, metavar="OUT", help="new folder, which loads and resumes like a run")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write a checkpoint of `train.parallel: sharded` as one of whole safetensors files."""
    options = parser().parse_args(list(arguments))

    from rqvae.trainers import checkpoint
    from rqvae.trainers.consolidate import consolidate

    made = consolidate(options.source, options.out)
    sys.stdout.write(f"{made}: {', '.join(checkpoint.groups(made))}\n")
    return 0
