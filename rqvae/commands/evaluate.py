"""Score a trained autoencoder on a split: MSE, KL, PSNR, SSIM and samples under CHECKPOINT/eval_results_SPLIT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, config_files, thread_count


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae evaluate", description=__doc__)
    own.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML files, later ones over earlier ones")
    own.add_argument(
        "--config", "--config-path", action="append", default=[], metavar="CONFIG", help="the same as CONFIG"
    )
    own.add_argument(
        "--checkpoint-path",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="final_model of a run, a folder that diffusers loads, a run or a checkpoint",
    )
    own.add_argument("--eval-split", choices=("train", "val", "test"), default="test", help="test by default")
    own.add_argument("--num-samples-to-save", type=int, default=10, metavar="N", help="original beside reconstruction")
    own.add_argument("--batch-size", type=int, default=8, help="images of a batch")
    own.add_argument("--max-images", type=int, default=0, metavar="N", help="of the split; 0, the default, is all")
    own.add_argument("--backend", help="a name of the README's table; RQVAE_BACKEND or automatic by default")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads")
    return own


def run(arguments: Sequence[str]) -> int:
    """Score a trained autoencoder on a split: MSE, KL, PSNR, SSIM and samples under CHECKPOINT/eval_results_SPLIT."""
    options, overrides = parser().split(arguments)

    from rqvae import backends
    from rqvae.configuration import read
    from rqvae.trainers.evaluate import EvaluateRequest, evaluate

    request = EvaluateRequest(
        options.checkpoint_path,
        options.eval_split,
        options.num_samples_to_save,
        options.batch_size,
        options.max_images,
    )
    configuration = read(config_files(options), overrides, inference=True)
    backend = backends.create(backends.choose(options.backend), threads=options.threads)
    try:
        scores = evaluate(configuration.instantiate(), backend, request)
    finally:
        backend.close()
    sys.stdout.write(f"{request.folder}: " + ", ".join(f"{k} {v:.6g}" for k, v in scores.items()) + "\n")
    return 0
