"""A step of a generator's training with the health observer against the same step without it; batch for about 30 ms.

Two trainers of one process, with the same weights, images and log every 50 steps, take steps in turn. A look every 500
steps runs in a process of its own while they do.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.record import alternate, save
from rqvae import backends
from rqvae.callbacks.health import Health
from rqvae.callbacks.interfaces import Observer
from rqvae.configuration import read
from rqvae.img_datasets.feed import Feed, Positions
from rqvae.img_datasets.interfaces import LabeledImageDatasetWrapper
from rqvae.run import Stage2Run
from rqvae.trainers import stage2_trainer
from rqvae.trainers.clock import Clock
from rqvae.trainers.logging import RunLog
from rqvae.trainers.meter import Meter
from rqvae.trainers.session import Session
from rqvae.trainers.settings import CheckpointSettings, LogSettings
from rqvae.trainers.state import TrainState
from rqvae.trainers.trainer import Trainer

CONFIG = "configs/debug/stage2.yaml"
OVERRIDES = ["--train.log_every", "50", "--data.batch_size", "64"]


def trainer_of(folder: Path, observers: Sequence[Observer]) -> Trainer:
    """With its log on disk, never due for a checkpoint."""
    run = read([CONFIG], OVERRIDES).instantiate()
    assert isinstance(run, Stage2Run)
    backend = backends.create("cpu")
    dataset, transform = run.data.make("train")
    dataset.open()
    clock = Clock(run.data.batch_size, len(dataset), total_steps=10**9)
    parts = stage2_trainer.build(run, backend, clock)
    stream = LabeledImageDatasetWrapper(dataset, transform, parts.draws, run.train.seed, shuffle=True)
    feed = Feed(stream, Positions(0, None, run.data.batch_size), 0, backend.feed)
    state = TrainState(backend, parts.modules, parts.ema, parts.updates, Meter(backend), {})
    folder.mkdir()
    log = RunLog(folder, LogSettings(tensorboard=False, wandb="disabled"), "p", None, 0, {})
    session = Session(folder, None, 2.0)
    every = CheckpointSettings(every=10**9)
    return Trainer(
        backend, parts.updates, parts.ema, feed, clock, state, session, log, run.train, every, observers=observers
    )


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        watched = trainer_of(Path(place) / "watched", [Health(every="500 steps")])
        alone = trainer_of(Path(place) / "alone", [])
        figures = alternate(watched.step, alone.step, options.pairs)
        weights = [next(iter(t.state.modules.values())).state_dict() for t in (watched, alone)]
        same = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
        watched.notify("on_fit_end")
    save("health_live", {**figures, "weights_identical": same})


if __name__ == "__main__":
    main()
