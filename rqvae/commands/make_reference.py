"""Write the reference that FID is computed against, from a config's own data: --fid_gt_act_path takes it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, check_world_size, json_object, thread_count


def parser() -> Parser:
    """The options of this command."""
    own = Parser(
        "rqvae make-reference",
        description=__doc__,
        epilog="Images are those of the split, cropped by data.val_transform, never augmented; a run with another "
        "transform, image size or extractor refuses the file. Every key of the config is an option too.",
    )
    own.add_argument("file", metavar="CONFIG", help="YAML file of a run")
    own.add_argument("out", type=Path, metavar="OUT.npz", help="file to write")
    own.add_argument("--config", action="append", default=[], help="more YAML files, each over the ones before")
    own.add_argument("--split", choices=("train", "val", "test"), required=True, help="whose images")
    own.add_argument("--images", type=int, default=0, help="how many of the split in file order; 0 for all")
    own.add_argument("--extractor", default="inception", help="inception, random-vgg16, or a class path")
    own.add_argument("--weights", help="file or URL of the Inception weights; pytorch-fid's URL by default")
    own.add_argument("--extractor-args", type=json_object, default={}, metavar="JSON", help="more of its arguments")
    own.add_argument(
        "--keep",
        choices=("features", "statistics"),
        help="default: features where there are few images, else statistics",
    )
    own.add_argument("--batch-size", type=int, default=50, help="images of one forward, on each rank")
    own.add_argument("--world-size", type=int, default=1, help="processes on this host")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads of a process")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write the reference that FID is computed against, from a config's own data."""
    options, overrides = parser().split(arguments)

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.make_reference import ReferenceRequest, make_reference

    configuration = read([options.file, *options.config], overrides, inference=True)
    request = ReferenceRequest(
        options.out,
        options.split,
        options.images,
        options.batch_size,
        options.keep,
        options.extractor,
        options.weights,
        options.extractor_args,
    )
    if backends.needs_launch(check_world_size(options)):
        return backends.launch(
            ["make-reference", *arguments], options.world_size, threads=options.threads, backend=options.backend
        )
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        facts = make_reference(configuration.instantiate(), backend, request)
        if backend.rank == 0:
            sys.stdout.write(f"{request.out}: {facts['kept']} of {facts['n']} images of {request.split}\n")
    finally:
        backend.close()
    return 0
