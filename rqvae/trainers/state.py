"""What a run is made of on disk: weights, averages, optimizers, the clock, and the unfinished row of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Stateful
from rqvae.durations import Duration
from rqvae.errors import BadInput, RunFailed
from rqvae.models.ema import EMA
from rqvae.shards import is_sharded
from rqvae.trainers import checkpoint
from rqvae.trainers.clock import Clock
from rqvae.trainers.finite import first_not_finite
from rqvae.trainers.meter import Meter
from rqvae.trainers.mirror import Mirror
from rqvae.trainers.nonfinite import Skips
from rqvae.trainers.parts import on_main
from rqvae.trainers.settings import CheckpointSettings
from rqvae.trainers.updates import Update
from rqvae.trainers.writing import BackgroundWriter, host_copy

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Args:
        backend: this process's device.
        modules: bare modules by name, for example `stage1` and `discriminator`.
        ema: averages of the first module.
        updates: their optimizers are saved under the update's name.
        meter: sums since the last row; `skips` are the updates that were left out.
        facts: goes into meta.json; `must_match` names those that a resumed run must share.
        extras: what else keeps a state, by file name.
        mirror: sends the run to its URL; None for a run in a folder of this machine alone.
    """

    backend: Backend
    modules: Mapping[str, nn.Module]
    ema: list[EMA]
    updates: list[Update]
    meter: Meter
    facts: dict[str, Any]
    must_match: tuple[str, ...] = ()
    mirror: Mirror | None = None
    extras: Mapping[str, Stateful] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.skips = Skips([update.name for update in self.updates], self.backend.device)
        self._best: dict[str, Any] | None = None
        self._writer, self._sender = BackgroundWriter(), BackgroundWriter()

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Tensors by file name."""
        main = next(iter(self.modules))
        skips = self.skips.state_dict()
        return {
            **{f"model/{name}": module.state_dict() for name, module in self.modules.items()},
            **{f"{ema.name}/{main}": ema.state_dict() for ema in self.ema},
            **{f"optimizer/{update.name}": update.state_dict() for update in self.updates},
            **({"log/skips": skips} if skips else {}),
            **{f"callbacks/{name}": extra.state_dict() for name, extra in self.extras.items()},
        }

    def is_best(self, values: Mapping[str, float], step: int, settings: CheckpointSettings) -> bool:
        """Whether a row has the best value so far of `checkpoint.best`, which the next checkpoint then remembers.

        Every rank calls it with a row of the same names.
        """
        rule = settings.best
        if rule is None or rule.metric not in values:
            return False
        known = self._best if self._best and self._best["metric"] == rule.metric else None
        value = values[rule.metric]
        # rank 0 decides: a value that differs between ranks, such as a speed, must not send one of them to save alone
        if not self.backend.broadcast(rule.better(value, known["value"] if known else None)):
            return False
        self._best = {"metric": rule.metric, "value": value, "step": step}
        return True

    def save(self, run: Path, clock: Clock, settings: CheckpointSettings) -> None:
        """Write a checkpoint of the present step and remove those that need not stay. Every rank calls it.

        Raises:
            RunFailed: something of it is not finite, or it cannot be written; with `checkpoint.asynchronous`, also
                where the one before could not be written; at a URL, where the one before could not be sent.
        """
        sums, counts = self.meter.state()
        groups = {"log/sums": sums, **self.tensors()}
        if bad := first_not_finite(self.backend, groups):
            last = self.last_good(run)
            raise RunFailed(f"step {clock.step}: {bad} is not finite; the last good checkpoint is {last}")
        split = {name: group for name, group in groups.items() if any(is_sharded(value) for value in group.values())}
        if split:
            if not on_main(self.backend, lambda: self._begin(_folder(run, clock.step), groups)):
                return
            checkpoint.write_shards(_folder(run, clock.step), split)
        sent = self.mirror.send_shards(self.backend, _folder(run, clock.step)) if split and self.mirror else {}
        rest = {name: group for name, group in groups.items() if name not in split}
        on_main(self.backend, lambda: self._write(run, clock, settings, rest, counts, sent if split else None))

    def _begin(self, folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Make room for shards; False where the checkpoint is there already."""
        self._wait()
        if checkpoint.is_undamaged(folder):
            return False
        if self.mirror:
            self.mirror.forget(folder)
        checkpoint.begin(folder, groups)
        return True

    def _write(
        self,
        run: Path,
        clock: Clock,
        settings: CheckpointSettings,
        groups: Mapping[str, Mapping[str, Tensor]],
        counts: dict[str, int],
        shards: Mapping[str, Any] | None,
    ) -> None:
        """Write what is whole; `shards`, where there are any, is what COMPLETE is to list of those sent elsewhere."""
        self._writer.wait()
        folder = _folder(run, clock.step)
        if checkpoint.is_undamaged(folder):
            return  # a resumed run comes by again, with the same numbers
        meta = {
            "clock": clock.state_dict(),
            "evaluate": self.ema[0].name if self.ema else "model",
            "log_counts": counts,
            "world_size": self.backend.world_size,
            "time": time.time(),
            **({"best": self._best} if self._best else {}),
            **self.facts,
        }
        best = {_folder(run, self._best["step"]).name} if self._best and settings.best else set()

        def outdated(found: Collection[str], good: Collection[str]) -> list[str]:
            keep = best | self._kept(good, settings, clock)
            return checkpoint.outdated(found, good, folder.name, settings.keep_last, keep)

        def write(copied: bool) -> None:
            checkpoint.save(folder, groups, meta, copied, shards is not None, shards)
            self._sender.wait()  # before anything goes that it may be sending
            checkpoint.prune(run, outdated)
            log.info("checkpoint %s", folder)
            if mirror := self.mirror:
                self._sender.submit(lambda: mirror.send(outdated))

        if settings.asynchronous:
            checkpoint.check_room(folder, groups)
            groups = host_copy(groups)
            self._writer.submit(lambda: write(copied=True))
        else:
            write(copied=False)

    def finish_writing(self) -> None:
        """Wait for a checkpoint that is being written or sent; every rank calls it, and gets the error if any."""
        on_main(self.backend, self._wait)

    def _wait(self) -> None:
        self._writer.wait()
        self._sender.wait()

    def settle(self) -> None:
        """Wait for it where another error is on its way."""
        self._writer.settle()
        self._sender.settle()

    def warn_of_small_disk(self, run: Path, settings: CheckpointSettings) -> None:
        """Say so where the disk has no room for the checkpoints that will lie side by side."""
        if self.backend.rank:
            return
        # an optimizer has no state before its first step: AdamW keeps two moments
        moments = sum(2 * p.nbytes for update in self.updates for p in update.params if not update.optimizer.state)
        one, free = checkpoint.size_of(self.tensors()) + moments, checkpoint.free_bytes(run)
        needed = one * (settings.keep_last + 1)
        if free is not None and free < needed:
            log.warning(
                "%s: %d checkpoints of %s need %s (one is written before the oldest goes), the disk has %s free",
                run,
                settings.keep_last + 1,
                checkpoint.in_words(one),
                checkpoint.in_words(needed),
                checkpoint.in_words(free),
            )

    @staticmethod
    def _kept(names: Collection[str], settings: CheckpointSettings, clock: Clock) -> set[str]:
        if settings.keep_every is None:
            return set()
        every = Duration.parse(settings.keep_every)
        kept = set()
        for name in names:
            images = int(name.removeprefix("step_")) * clock.batch_size
            before = clock.position(every.unit, images - clock.batch_size) // every.amount
            if clock.position(every.unit, images) // every.amount > before:
                kept.add(name)
        return kept

    def load(self, folder: Path, clock: Clock) -> None:
        """Go on from a checkpoint.

        Raises:
            BadInput: weights of another architecture, other Stage1 weights, another optimizer.
        """
        meta = checkpoint.read_meta(folder)
        for key in self.must_match:
            if meta.get(key) != self.facts.get(key):
                raise BadInput(
                    f"{folder}: {key} of the checkpoint is {meta.get(key)}, of this run {self.facts.get(key)}"
                )
        for name, module in self.modules.items():
            tensors = checkpoint.read(folder, f"model/{name}", module.state_dict().get)
            checkpoint.load_into(module, tensors, f"{folder}/model/{name}")
        main = next(iter(self.modules))
        for ema in self.ema:
            tensors = checkpoint.read(folder, f"{ema.name}/{main}", ema.average.get)
            ema.load_state_dict({k: v.to(self.backend.device) for k, v in tensors.items()})
        for update in self.updates:
            tensors = checkpoint.read(folder, f"optimizer/{update.name}", update.parameter_of)
            update.load_state_dict({k: v.to(self.backend.device) for k, v in tensors.items()})
        if "log/skips" in checkpoint.groups(folder):
            skips = checkpoint.read(folder, "log/skips")
            self.skips.load_state_dict({k: v.to(self.backend.device) for k, v in skips.items()})
        for name, extra in self.extras.items():
            if f"callbacks/{name}" in checkpoint.groups(folder):  # else it is new in this run
                extra.load_state_dict(checkpoint.read(folder, f"callbacks/{name}"))
        self._best = meta.get("best")
        sums = checkpoint.read(folder, "log/sums")
        self.meter.load_state({k: v.to(self.backend.device) for k, v in sums.items()}, meta["log_counts"])
        clock.load_state_dict(meta["clock"])

    @staticmethod
    def last_good(run: Path) -> Path | None:
        """The newest complete checkpoint of a run whose files are undamaged."""
        for folder in reversed(checkpoint.in_run(run)):
            try:
                checkpoint.verify(folder)
            except BadInput as error:
                log.warning("%s; the one before it is used", error)
            else:
                return folder
        return None


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"
