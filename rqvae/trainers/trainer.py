"""The loop. It knows neither images nor stages: it takes micro-batches, updates and observers, and keeps time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Intervention, Observer
from rqvae.durations import Duration
from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.feed import Feed
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.ema import EMA
from rqvae.randomness import Draw, fill_batch, fold
from rqvae.trainers.clock import Clock
from rqvae.trainers.logging import RunLog
from rqvae.trainers.meter import Meter, Window
from rqvae.trainers.nonfinite import Skips
from rqvae.trainers.session import Session, Wish
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
    _applied: Tensor | None = field(default=None, init=False)
    _is_best: bool = field(default=False, init=False)

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
            self.state.warn_of_small_disk(self.folder, self.checkpoints)
            self.notify("on_fit_start")
            self.backend.mark_step()  # what was set up is not part of the first step's graph
            try:
                while self.clock.step < self.clock.total_steps and not self.session.stopping(self.backend):
                    self._obey()
                    self.step()
                finished = self.clock.step >= self.clock.total_steps
                if not finished:
                    self.save()
                self.backend.settle()
                self.state.finish_writing()
            except RunFailed:
                raise
            except BaseException:
                self.backend.settle()  # the rows of the steps that were done
                raise
            finally:
                self.state.settle()
                self.feed.close()
                self.notify("on_fit_end")
        return finished

    def _obey(self) -> None:
        """Do what an intervention asked for; all ranks know of it in the same step."""
        wish = self.session.granted
        if wish is None:
            return
        why = self.backend.broadcast(self.session.fulfil())
        if wish == "stop":
            raise RunFailed(f"step {self.clock.step}: stopped: {why}; {self._where_to_go_on()}")
        log.warning("step %d: checkpoint: %s", self.clock.step, why)
        self.save()

    def step(self) -> None:
        """One turn of the loop: images in, weights changed, time ticked, observers told, row and checkpoint if due."""
        micros = self._with_draws(self.feed.next_step())
        self.notify("before_step", micros)
        losses = self.optimise(micros)
        for ema in self.ema:
            ema.update(self.clock.step, self._applied)
        self.clock.tick()
        self.backend.mark_step()  # the training graph ends here: observers are not traced into it
        self.notify("after_step", losses)
        self.write_row()
        if self.checkpoints.best:
            self.backend.settle()  # this row may ask for a checkpoint of this very step
        if self.clock.due(self._save_every) or self._is_best:
            self.save()

    def _with_draws(self, micros: list[LabeledImageData]) -> list[LabeledImageData]:
        if not self.rank_draws:
            return micros
        seed = fold(self.train.seed, "rank", self.backend.rank, self.clock.step)
        source = self.backend.generator(seed)
        drawn = [fill_batch(self.rank_draws, len(micro), source) for micro in micros]
        on_device = [{name: x.to(self.backend.device) for name, x in draws.items()} for draws in drawn]
        return [replace(micro, draws=draws) for micro, draws in zip(micros, on_device, strict=True)]

    def optimise(self, micros: list[LabeledImageData]) -> dict[str, Tensor]:
        """One optimizer step of every update that has started."""
        logged: dict[str, Tensor] = {}
        # what a module draws itself (dropout) is a function of seed, step and rank; nothing of it is saved
        self.backend.seed(fold(self.train.seed, "modules", self.clock.step, self.backend.rank))
        for update in self.updates:
            if self.clock.step < update.starts:
                continue
            lr, observed = update.schedule(self.clock), []
            with only_grads(update, among=self.updates):
                for m, micro in enumerate(micros):
                    last = m == len(micros) - 1
                    with self.backend.accumulate(update.wrapped, sync=last):
                        with self.backend.autocast():
                            losses = update.loss(micro, m)
                        self.notify("after_loss", update, micro, losses)
                        self.backend.backward(losses.total / len(micros), update.scaler)
                    observed.append({name: part.detach() for name, part in losses.parts.items()})
                    for name, part in observed[-1].items():
                        logged[name] = logged.get(name, 0) + part / len(micros)
                self.backend.reduce(update.params)
                update.unscale()
                self.notify("after_backward", update)
                for intervention in self.interventions:
                    intervention.before_update(self, update)
                norm, applied = self._apply(update)
            suffix = "" if update is self.updates[0] else f"_{update.name}"
            for values in (*observed, {f"{name}{suffix}": x for name, x in update.figures(norm).items()}):
                self.meter.add(values, applied=applied)
            self._row[f"train/lr{suffix}"] = lr
        return logged

    def _apply(self, update: Update) -> tuple[Tensor, Tensor | None]:
        """Change the weights; the gradients' norm, and whether they were changed (None: they always are)."""
        limit, skips = self.train.skip_nonfinite, self.state.skips
        at_most = skips.ceiling(update.name, self.train.skip_spikes) if limit and not update.scaler else None
        norm = self.backend.step(
            update.optimizer, update.params, clip=update.settings.clip, scaler=update.scaler, at_most=at_most
        )
        applied = skips.judge(update.name, norm, self.clock.step + 1, limit, at_most) if limit else None
        if update is self.updates[0]:
            self._applied = applied
        return norm, applied

    def notify(self, event: str, *values: object) -> None:
        """Tell every observer."""
        for observer in self.observers:
            getattr(observer, event)(self, *values)

    def log_scalars(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the row of the present step."""
        self._row |= values

    def log_groups(self, name: str, values_b: Tensor, group_b: Tensor, groups: int) -> None:
        """Add samples (B,) to the means `train/NAME_GROUP` of the row that comes next."""
        self.meter.add_groups(name, values_b, group_b, groups)

    def ask(self, what: Wish, why: str) -> None:
        """On rank 0: have all ranks save, or stop without saving, before one of the next steps."""
        self.session.ask(what, why)

    def log_picture(self, name: str, image_hwc: np.ndarray) -> None:
        """Show a picture; rank 0 writes it."""
        if self.run_log:
            self.run_log.picture(name, image_hwc, self.clock.step)

    def log_film(self, name: str, frames_thwc: np.ndarray, fps: float) -> None:
        """Show a film; rank 0 writes it."""
        if self.run_log:
            self.run_log.film(name, frames_thwc, fps, self.clock.step)

    def write_row(self) -> None:
        """Write this step's row where one is due, or where an observer added to it."""
        rates = {k: v for k, v in self._row.items() if k.startswith("train/lr")}
        due = self.clock.due(self._log_every)
        if not due and len(rates) == len(self._row):
            return
        row = {k: v for k, v in self._row.items() if due or k not in rates}
        self._row = {}
        window = self.meter.take() if due else Window(self.backend, {}, {})
        if due:
            row = {**self.state.skips.row(), **row}
            self._check_best(window.names | row.keys())
        tensors = window.tensors | {k: v for k, v in row.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in row.items() if not isinstance(v, Tensor)}
        moment = {"step": self.clock.step, "images": self.clock.images, "epoch": self.clock.epoch}
        self.backend.when_ready(
            lambda **values: self._log_values(moment, {**window.means(values), **numbers}), **tensors
        )

    def _check_best(self, row: Collection[str]) -> None:
        rule = self.checkpoints.best
        whole = all(self.clock.step > update.starts for update in self.updates)
        if rule and whole and rule.metric.startswith("train/") and rule.metric not in row:
            raise BadInput(f"checkpoint.best.metric: expected one of {', '.join(sorted(row))}, got {rule.metric}")

    def _log_values(self, moment: dict[str, float], values: dict[str, float]) -> None:
        marks = {k: values.pop(k) for k in list(values) if k in self.state.skips.marks()}
        if self.run_log:
            self.run_log.write({**moment, "time": round(time.time(), 3)}, values)
        self._stop_if_exceeded(marks)
        self._is_best |= self.state.is_best(values, int(moment["step"]), self.checkpoints)
        bad = [k for k, v in values.items() if k.startswith("train/") and not math.isfinite(v)]
        # a value whose every observation in the row belongs to updates that were left out has no mean
        if bad and not Skips.any_in(values):
            since = moment["images"] - self.clock.batch_size * self.clock.steps_of(self._log_every)
            samples = f"samples {max(0, int(since))} to {int(moment['images']) - 1} of the stream"
            what = f"step {moment['step']}: {', '.join(bad)} is not finite ({samples})"
            raise RunFailed(f"{what}; {self._where_to_go_on()}")

    def _stop_if_exceeded(self, values: dict[str, float]) -> None:
        limit = self.train.skip_nonfinite
        spikes = f", or over {self.train.skip_spikes:g} times their usual norm," if self.train.skip_spikes else ""
        for name, step in Skips.exceeded(values).items():
            first = (step - limit - 1) * self.clock.batch_size
            raise RunFailed(
                f"step {step}: update {name}: the gradients were not finite{spikes} in {limit + 1} steps in a row, "
                f"from step {step - limit} on (samples {first} to {step * self.clock.batch_size - 1} of the stream); "
                f"expected at most train.skip_nonfinite = {limit}; {self._where_to_go_on()}"
            )

    def _where_to_go_on(self) -> str:
        last = self.state.last_good(self.folder)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def save(self) -> None:
        """Write a checkpoint of the present step; every rank calls it."""
        self._is_best = False
        if marks := self.state.skips.marks():
            self.backend.when_ready(lambda **values: self._stop_if_exceeded(values), **marks)
        self.backend.settle()
        self.state.save(self.folder, self.clock, self.checkpoints)
