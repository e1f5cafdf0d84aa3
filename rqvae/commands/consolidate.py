"""Write a checkpoint of `train.parallel: sharded` as one of whole safetensors files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, folder_at


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae consolidate", description=__doc__)
    own.add_argument("source", metavar="RUN", help="run (its newest checkpoint) or checkpoint folder, or its URL")
    own.add_argument("out", type=Path, metavar="OUT", help="new folder, which loads and resumes like a run")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write a checkpoint of `train.parallel: sharded` as one of whole safetensors files."""
    options = parser().parse_args(list(arguments))

    from rqvae.trainers import checkpoint
    from rqvae.trainers.consolidate import consolidate

    made = consolidate(folder_at(options.source), options.out)
    sys.stdout.write(f"{made}: {', '.join(checkpoint.groups(made))}\n")
    return 0
