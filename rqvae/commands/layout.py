"""Judge whether a generator on masks puts each class where its mask says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, folder_at, thread_count


def parser() -> Parser:
    """The options of this command."""
    own = Parser(
        "rqvae layout",
        description=__doc__,
        epilog="A small segmenter is trained on the real images of the train split alone. Its mean IoU on real images "
        "is the bound; then come samples against their masks, and against the masks of other images.",
    )
    own.add_argument("run", metavar="RUN", help="run folder of a Stage2 generator on masks, or its URL")
    own.add_argument("--images", type=int, default=256, help="how many masks of the split, in file order")
    own.add_argument("--split", choices=("train", "val", "test"), default="test", help="whose masks")
    own.add_argument("--judge-steps", type=int, default=400, help="batches that the segmenter is trained on")
    own.add_argument("--batch-size", type=int, default=32, help="images of a batch")
    own.add_argument("--seed", type=int, default=0, help="of the segmenter and of the samples")
    own.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads")
    return own


def run(arguments: Sequence[str]) -> int:
    """Judge whether a generator on masks puts each class where its mask says."""
    options = parser().parse_args(list(arguments))

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.errors import BadInput
    from rqvae.files import write_json
    from rqvae.run import Stage2Run
    from rqvae.trainers.layout_control import LayoutRequest, layout_control

    folder = folder_at(options.run)
    request = LayoutRequest(
        folder,
        options.images,
        options.split,
        options.judge_steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    experiment = read([folder / "config.yaml"], []).instantiate()
    if not isinstance(experiment, Stage2Run):
        raise BadInput(f"{options.run}: expected a Stage2 run, this one is an autoencoder")
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        scores = layout_control(experiment, backend, request)
    finally:
        backend.close()
    if options.json:
        write_json(options.json, {**scores, "split": options.split, "run": str(folder)})
    sys.stdout.write(
        f"mean IoU of {scores['n']:g} masks: real images {scores['real']:.3f}, samples {scores['samples']:.3f} "
        f"({100 * scores['share']:.1f} % of real), against other masks {scores['shuffled']:.3f}; "
        f"class shares off by {scores['proportions']:.3f}\n"
    )
    return 0
