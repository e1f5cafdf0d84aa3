"""A step of our trainer against a bare hand-written loop of the same model, optimizer, clipping and average.

Both load the same images in the same process and draw the same kinds of random numbers; ours also keeps the log, the
clock, the checks for signals and the sample-keyed numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

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


def our_trainer(folder: Path) -> Trainer:
    """The trainer with its log on disk, never due for a checkpoint."""
    run = read([CONFIG], [*OVERRIDES, *MODEL]).instantiate()
    assert isinstance(run, Stage1Run)
    backend = backends.create("cpu")
    dataset, transform = run.data.make("train")
    dataset.open()
    clock = Clock(run.data.batch_size, len(dataset), total_steps=10**9)
    parts = stage1_trainer.build(run, backend, clock)
    stream = LabeledImageDatasetWrapper(dataset, transform, parts.draws, run.train.seed, shuffle=True)
    feed = Feed(stream, Positions(0, None, run.data.batch_size), 0, backend.feed)
    state = TrainState(backend, parts.modules, parts.ema, parts.updates, Meter(backend), {})
    log = RunLog(folder, LogSettings(tensorboard=False, wandb="disabled"), "p", None, 0, {})
    every = CheckpointSettings(every=10**9)
    session = Session(folder, None, 2.0)
    return Trainer(backend, parts.updates, parts.ema, feed, clock, state, session, log, run.train, every)


def bare_loop() -> Iterator[None]:
    """What one would write in a notebook."""
    run = read([CONFIG], [*OVERRIDES, *MODEL]).instantiate()
    dataset, transform = run.data.make("train")
    dataset.open()
    stream = LabeledImageDatasetWrapper(dataset, transform, {}, 0, shuffle=True)
    loader = torch.utils.data.DataLoader(stream, batch_size=run.data.batch_size, collate_fn=stream.collate_fn)
    model = run.stage1.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    shape = model.latent_shape(dataset.spec.image_shape)
    while True:
        for batch in loader:
            noise = torch.randn(len(batch), *shape)
            inputs = LabeledImageData(img=batch.img, draws={"posterior": noise})
            loss = model.compute_loss(model(inputs), inputs).loss_total
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.1)
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(bare_loop()) as bare:
        trainer = our_trainer(Path(folder))
        save("trainer_overhead", alternate(trainer.step, lambda: next(bare), options.pairs))


if __name__ == "__main__":
    main()
