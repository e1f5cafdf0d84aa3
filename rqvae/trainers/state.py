"""What a run is made of on disk: weights, averages, optimizers, the clock, and the unfinished row of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rqvae.backends import Backend
from rqvae.durations import Duration
from rqvae.errors import BadInput, RunFailed
from rqvae.models.ema import EMA
from rqvae.trainers import checkpoint
from rqvae.trainers.clock import Clock
from rqvae.trainers.meter import Meter
from rqvae.trainers.parts import on_main
from rqvae.trainers.settings import CheckpointSettings
from rqvae.trainers.updates import Update

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Args:
        backend: this process's device.
        modules: bare modules by name, for example `stage1` and `discriminator`.
        ema: averages of the first module.
        updates: their optimizers are saved under the update's name.
        meter: sums since the last row.
        facts: goes into meta.json; `must_match` names those that a resumed run must share.
    """

    backend: Backend
    modules: Mapping[str, nn.Module]
    ema: list[EMA]
    updates: list[Update]
    meter: Meter
    facts: dict[str, Any]
    must_match: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Tensors by file name."""
        main = next(iter(self.modules))
        return {
            **{f"model/{name}": module.state_dict() for name, module in self.modules.items()},
            **{f"{ema.name}/{main}": ema.state_dict() for ema in self.ema},
            **{f"optimizer/{update.name}": update.state_dict() for update in self.updates},
        }

    def save(self, run: Path, clock: Clock, settings: CheckpointSettings) -> None:
        """Write a checkpoint of the present step and remove those that need not stay. Every rank calls it."""
        sums, counts = self.meter.state()
        if bad := [key for key, value in sums.items() if not bool(value.isfinite())]:
            last = self.last_good(run)
            raise RunFailed(f"step {clock.step}: {', '.join(bad)} is not finite; the last good checkpoint is {last}")
        on_main(self.backend, lambda: self._write(run, clock, settings, sums, counts))

    def _write(
        self, run: Path, clock: Clock, settings: CheckpointSettings, sums: dict[str, Tensor], counts: dict[str, int]
    ) -> None:
        folder = run / "checkpoints" / f"step_{clock.step:08d}"
        if checkpoint.is_good(folder):
            return
        meta = {
            "clock": clock.state_dict(),
            "evaluate": self.ema[0].name if self.ema else "model",
            "log_counts": counts,
            "world_size": self.backend.world_size,
            "time": time.time(),
            **self.facts,
        }
        checkpoint.save(folder, {**self.tensors(), "log/sums": sums}, meta)
        checkpoint.prune(run, settings.keep_last, self._kept(run, settings, clock))
        log.info("checkpoint %s", folder)

    @staticmethod
    def _kept(run: Path, settings: CheckpointSettings, clock: Clock) -> set[Path]:
        if settings.keep_every is None:
            return set()
        every = Duration.parse(settings.keep_every)
        kept = set()
        for folder in checkpoint.in_run(run):
            images = int(folder.name.removeprefix("step_")) * clock.batch_size
            before = clock.position(every.unit, images - clock.batch_size) // every.amount
            if clock.position(every.unit, images) // every.amount > before:
                kept.add(folder)
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
            checkpoint.load_into(module, checkpoint.read(folder, f"model/{name}"), f"{folder}/model/{name}")
        main = next(iter(self.modules))
        for ema in self.ema:
            tensors = checkpoint.read(folder, f"{ema.name}/{main}")
            ema.load_state_dict({k: v.to(self.backend.device) for k, v in tensors.items()})
        for update in self.updates:
            tensors = checkpoint.read(folder, f"optimizer/{update.name}")
            update.load_state_dict({k: v.to(self.backend.device) for k, v in tensors.items()})
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
