"""The loop. It knows neither images nor stages: it takes micro-batches, updates and observers, and keeps time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Intervention, Observer
from rqvae.durations import Duration
from rqvae.errors import RunFailed
from rqvae.img_datasets.feed import Feed
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.ema import EMA
from rqvae.randomness import Draw, fill_batch, fold
from rqvae.trainers.clock import Clock
from rqvae.trainers.logging import RunLog
from rqvae.trainers.meter import Meter
from rqvae.trainers.session import Session
from rqvae.trainers.settings import CheckpointSettings, TrainSettings
from rqvae.trainers.state import TrainState
from rqvae.trainers.updates import Update, only_grads

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Runs updates over a feed until the clock says that the run is over.

    Args:
        backend: this process's device.
        updates: in the order in which they are done in a step.
        ema: running averages, updated after each step.
        feed: this rank's micro-batches.
        clock: time.
        state: what is saved and loaded.
        session: signals, the run's folder and its lock.
        run_log: rank 0's log; None on other ranks.
        rank_draws: numbers drawn here for whole batches, `train.noise: per_rank`; empty where the feed brings them.
    """

    backend: Backend
    updates: list[Update]
    ema: list[EMA]
    feed: Feed
    clock: Clock
    state: TrainState
    session: Session
    run_log: RunLog | None
    train: TrainSettings
    checkpoints: CheckpointSettings
    observers: Sequence[Observer] = ()
    interventions: Sequence[Intervention] = ()
    rank_draws: Mapping[str, Draw] = field(default_factory=dict)
    meter: Meter = field(init=False)
    _row: dict[str, Tensor | float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.meter = self.state.meter
        self._log_every = Duration.parse(self.train.log_every)
        self._save_every = Duration.parse(self.checkpoints.every)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.backend.rank == 0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.session.folder

    def fit(self) -> bool:
        """Train to the end; False when a signal stopped the run before it, after a checkpoint."""
        with self.session:
            self.notify("on_fit_start")
            try:
                while self.clock.step < self.clock.total_steps and not self.session.stopping(self.backend):
                    self.step()
                finished = self.clock.step >= self.clock.total_steps
                if not finished:
                    self.save()
            finally:
                self.feed.close()
                self.notify("on_fit_end")
        return finished

    def step(self) -> None:
        """One turn of the loop: images in, weights changed, time ticked, observers told, row and checkpoint if due."""
        micros = self._with_draws(self.feed.next_step())
        self.notify("before_step", micros)
        losses = self.optimise(micros)
        for ema in self.ema:
            ema.update(self.clock.step)
        self.clock.tick()
        self.backend.mark_step()  # the training graph ends here: observers are not traced into it
        self.notify("after_step", losses)
        self.write_row()
        if self.clock.due(self._save_every):
            self.save()

    def _with_draws(self, micros: list[LabeledImageData]) -> list[LabeledImageData]:
        if not self.rank_draws:
            return micros
        seed = fold(self.train.seed, "rank", self.backend.rank, self.clock.step)
        source = torch.Generator(device=self.backend.device).manual_seed(seed)
        return [replace(micro, draws=fill_batch(self.rank_draws, len(micro), source)) for micro in micros]

    def optimise(self, micros: list[LabeledImageData]) -> dict[str, Tensor]:
        """One optimizer step of every update that has started."""
        logged: dict[str, Tensor] = {}
        # what a module draws itself (dropout) is a function of seed, step and rank; nothing of it is saved
        self.backend.seed(fold(self.train.seed, "modules", self.clock.step, self.backend.rank))
        for update in self.updates:
            if self.clock.step < update.starts:
                continue
            lr = update.schedule(self.clock)
            with only_grads(update, among=self.updates):
                for m, micro in enumerate(micros):
                    last = m == len(micros) - 1
                    with self.backend.accumulate(update.wrapped, sync=last):
                        with self.backend.autocast():
                            losses = update.loss(micro, m)
                        self.backend.backward(losses.total / len(micros))
                    self.meter.add(losses.parts)
                    for name, part in losses.parts.items():
                        logged[name] = logged.get(name, 0) + part.detach() / len(micros)
                self.backend.reduce(update.params)
                self.notify("after_backward", update)
                for intervention in self.interventions:
                    intervention.before_update(self, update)
                norm = self.backend.step(update.optimizer, update.params, clip=update.settings.clip)
            suffix = "" if update is self.updates[0] else f"_{update.name}"
            self.meter.add({f"grad_norm{suffix}": norm})
            self._row[f"train/lr{suffix}"] = lr
        return logged

    def notify(self, event: str, *values: object) -> None:
        """Tell every observer."""
        for observer in self.observers:
            getattr(observer, event)(self, *values)

    def log_scalars(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the row of the present step."""
        self._row |= values

    def log_picture(self, name: str, image_hwc: np.ndarray) -> None:
        """Show a picture; rank 0 writes it."""
        if self.run_log:
            self.run_log.picture(name, image_hwc, self.clock.step)

    def write_row(self) -> None:
        """Write this step's row where one is due, or where an observer added to it."""
        rates = {k: v for k, v in self._row.items() if k.startswith("train/lr")}
        due = self.clock.due(self._log_every)
        if not due and len(rates) == len(self._row):
            return
        row = {**(self.meter.means() if due else {}), **{k: v for k, v in self._row.items() if due or k not in rates}}
        self._row = {}
        tensors = {k: v for k, v in row.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in row.items() if not isinstance(v, Tensor)}
        moment = {"step": self.clock.step, "images": self.clock.images, "epoch": self.clock.epoch}
        self.backend.when_ready(lambda **values: self._log_values(moment, {**values, **numbers}), **tensors)

    def _log_values(self, moment: dict[str, float], values: dict[str, float]) -> None:
        if self.run_log:
            self.run_log.write({**moment, "time": round(time.time(), 3)}, values)
        bad = [k for k, v in values.items() if k.startswith("train/") and not math.isfinite(v)]
        if bad:
            last = self.state.last_good(self.folder)
            where = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            since = moment["images"] - self.clock.batch_size * self.clock.steps_of(self._log_every)
            samples = f"samples {max(0, int(since))} to {int(moment['images']) - 1} of the stream"
            raise RunFailed(f"step {moment['step']}: {', '.join(bad)} is not finite ({samples}); {where}")

    def save(self) -> None:
        """Write a checkpoint of the present step; every rank calls it."""
        self.state.save(self.folder, self.clock, self.checkpoints)
