"""A step of our trainer on two processes against bare DistributedDataParallel: what the protocol costs.

Both train the same autoencoder on the same images in the same two processes, with clipping, fused AdamW and an average;
ours also keeps the log, the clock, the votes on signals and the sample-keyed numbers. Rank 0's times are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.record import alternate, save
from rqvae import backends
from rqvae.configuration import read
from rqvae.img_datasets.feed import Feed, Positions
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDatasetWrapper
from rqvae.run import Stage1Run
from rqvae.trainers import stage1_trainer
from rqvae.trainers.clock import Clock
from rqvae.trainers.logging import RunLog
from rqvae.trainers.meter import Meter
from rqvae.trainers.session import Session
from rqvae.trainers.settings import CheckpointSettings, LogSettings
from rqvae.trainers.state import TrainState
from rqvae.trainers.trainer import Trainer

CONFIG = "configs/debug/stage1.yaml"
OVERRIDES = ["--train.log_every", "50", "--data.batch_size", "32", "--data.dataset.init_args.size", "32"]
MODEL = ["--stage1.init_args.width", "32", "--stage1.init_args.multipliers", "[1,2,2]"]


def our_trainer(folder: Path, backend: backends.Backend) -> Trainer:
    """The trainer with its log on disk, never due for a checkpoint."""
    run = read([CONFIG], [*OVERRIDES, *MODEL]).instantiate()
    assert isinstance(run, Stage1Run)
    dataset, transform = run.data.make("train")
    dataset.open()
    clock = Clock(run.data.batch_size, len(dataset), total_steps=10**9)
    parts = stage1_trainer.build(run, backend, clock)
    stream = LabeledImageDatasetWrapper(dataset, transform, parts.draws, run.train.seed, shuffle=True)
    positions = Positions(0, None, run.data.batch_size, 1, backend.rank, backend.world_size)
    state = TrainState(backend, parts.modules, parts.ema, parts.updates, Meter(backend), {})
    logging = LogSettings(tensorboard=False, wandb="disabled")
    log = None if backend.rank else RunLog(folder, logging, "p", None, 0, {})
    feed, session = Feed(stream, positions, 0, backend.feed), Session(folder, None, 2.0)
    every = CheckpointSettings(every=10**9)
    return Trainer(backend, parts.updates, parts.ema, feed, clock, state, session, log, run.train, every)


class WithLoss(nn.Module):
    """The autoencoder and its loss as one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        inputs = LabeledImageData(img=images, draws={"posterior": noise})
        return self.model.compute_loss(self.model(inputs), inputs).loss_total


def bare_loop(rank: int, world_size: int) -> Iterator[None]:
    """What one would write in a script for torchrun."""
    run = read([CONFIG], [*OVERRIDES, *MODEL]).instantiate()
    dataset, transform = run.data.make("train")
    dataset.open()
    stream = LabeledImageDatasetWrapper(dataset, transform, {}, 0, shuffle=True)
    part = torch.utils.data.Subset(stream, range(rank, len(dataset), world_size))
    batch_size = run.data.batch_size // world_size
    loader = torch.utils.data.DataLoader(part, batch_size=batch_size, collate_fn=stream.collate_fn, drop_last=True)
    model = run.stage1.train()
    wrapped = DistributedDataParallel(WithLoss(model), broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    shape = model.latent_shape(dataset.spec.image_shape)
    while True:
        for batch in loader:
            wrapped(batch.img, torch.randn(len(batch), *shape)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.1)
            yield


def measure(pairs: int) -> None:
    """This rank's part of the measurement."""
    torch.set_num_threads(1)
    backend = backends.create("cpu")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(bare_loop(backend.rank, backend.world_size)) as bare:
            trainer = our_trainer(Path(folder), backend)
            figures = alternate(trainer.step, lambda: next(bare), pairs)
        if backend.rank == 0:
            save("ddp_overhead", {"world_size": backend.world_size, **figures})
        trainer.feed.close()
    backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    if backends.in_job():
        measure(options.pairs)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "benchmarks.ddp_overhead", "--pairs", str(options.pairs)]
    sys.exit(subprocess.run(torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode)


if __name__ == "__main__":
    main()
