"""Sample an image of any size from a mask of any size, tile by tile, with a generator on masks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, thread_count


def parser() -> Parser:
    """The options of this command."""
    own = Parser(
        "rqvae canvas",
        description=__doc__,
        epilog="The mask is a PNG of class numbers, or painted in the colours of the pictures that training writes.",
    )
    own.add_argument("run", metavar="RUN", help="run, checkpoint or exported folder, its URL, shipped name, or hub id")
    own.add_argument("mask", type=Path, metavar="MASK.png", help="the mask")
    own.add_argument("--out", type=Path, required=True, metavar="IMAGE.png", help="file to write; its facts beside it")
    own.add_argument("--steps", type=int, help="DDIM steps; the run's own by default")
    own.add_argument("--overlap", type=int, help="latent positions around a tile; a quarter of a tile by default")
    own.add_argument("--seed", type=int, default=0, help="of noise and shifts")
    own.add_argument("--batch-size", type=int, default=16, help="tiles of one call of the model")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads")
    return own


def run(arguments: Sequence[str]) -> int:
    """Sample an image of any size from a mask of any size, tile by tile, with a generator on masks."""
    options = parser().parse_args(list(arguments))

    from PIL import Image

    from rqvae import backends
    from rqvae.api import load
    from rqvae.errors import BadInput
    from rqvae.files import replacing, write_json
    from rqvae.trainers.canvas import CanvasRequest, sample_canvas
    from rqvae.trainers.painted_masks import read_painted

    request = CanvasRequest(options.steps, options.overlap, options.seed, options.batch_size)
    if options.out.suffix != ".png" or not options.out.parent.is_dir():
        raise BadInput(f"--out {options.out}: expected a .png in a folder that exists")
    pipeline = load(options.run)
    if pipeline.two_stage is None or not pipeline.spec.num_mask_classes:
        raise BadInput(f"{options.run}: expected a generator on masks")
    mask = read_painted(options.mask, pipeline.spec.num_mask_classes)
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        image, facts = sample_canvas(pipeline.two_stage.to(backend.device).eval(), mask, request)
    finally:
        backend.close()
    with replacing(options.out) as temporary:
        Image.fromarray(image).save(temporary)
    write_json(options.out.with_suffix(".json"), {**facts, "seed": request.seed, "run": str(options.run)})
    sys.stdout.write(
        f"{options.out}: {image.shape[1]} x {image.shape[0]}, {facts['tiles']} tiles in {facts['steps']} steps, "
        f"gradient across seams {facts['seam_ratio']:.3f} of elsewhere\n"
    )
    return 0
