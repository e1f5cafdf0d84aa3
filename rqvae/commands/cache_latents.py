"""Write Stage1's latents of a split to disk, for Stage2 training that names them in data.latents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rqvae.commands.options import Parser, check_world_size, thread_count

if TYPE_CHECKING:
    from rqvae.img_datasets.interfaces import Split


def parser() -> Parser:
    """The options of this command."""
    every_key = "Every key of the config is an option too (--data.workers 8). The same command again goes on."
    own = Parser("rqvae cache-latents", description=__doc__, epilog=every_key)
    own.add_argument("file", metavar="CONFIG", help="YAML file of a Stage2 run, or of a Stage1 run with --ckpt")
    own.add_argument("out", type=Path, metavar="OUT", help="folder of the cache")
    own.add_argument("--config", action="append", default=[], help="more YAML files, each over the ones before")
    own.add_argument("--ckpt", help="Stage1 run or checkpoint folder; stage1_checkpoint of the config by default")
    own.add_argument("--splits", type=_splits, default=("train",), metavar="SPLIT[,SPLIT...]", help="train by default")
    own.add_argument("--shard-size", type=int, default=4096, help="samples in a file")
    own.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type on disk")
    own.add_argument("--batch-size", type=int, default=32, help="images of one forward")
    own.add_argument("--world-size", type=int, default=1, help="processes on this host")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads of a process")
    return own


def run(arguments: Sequence[str]) -> int:
    """Write Stage1's latents of a split to disk, for Stage2 training that names them in data.latents."""
    options, overrides = parser().split(arguments)

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.img_datasets.latent_cache import LatentCache
    from rqvae.trainers.cache_latents import CacheRequest, CachingJob, check_request

    configuration = read([options.file, *options.config], overrides, inference=True)
    request = CacheRequest(
        options.out, options.ckpt, options.splits, options.shard_size, options.dtype, options.batch_size
    )
    if not backends.in_job():
        check_request(configuration.for_checks(), request)
        if backends.needs_launch(check_world_size(options)):
            return backends.launch(
                ["cache-latents", *arguments], options.world_size, threads=options.threads, backend=options.backend
            )
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        code = CachingJob(configuration.instantiate(), backend, request).execute()
        for split in request.splits if code == 0 and backend.rank == 0 else ():
            cache = LatentCache.open(request.out, split)
            mib = sum(shard["bytes"] for shard in cache.shards) / 2**20
            sys.stdout.write(
                f"{request.out}: {len(cache)} samples of {split} in {len(cache.shards)} shards, {mib:.1f} MiB\n"
            )
    finally:
        backend.close()
    return code


def _splits(text: str) -> tuple[Split, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := [name for name in names if name not in ("train", "val", "test")]:
        raise argparse.ArgumentTypeError(f"expected train, val or test, got {wrong[0]}")
    return cast("tuple[Split, ...]", names)
