"""Snapshots of the power-function averages, from which averages of other lengths are put together after training.

    RUN/ema_snapshots/step_00000500/power_ema_0.05/stage1.safetensors  meta.json  COMPLETE

They have the form of checkpoints, but are not pruned and hold nothing that a run goes on from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rqvae.backends import Backend
from rqvae.backends.sharded import whole_on_host
from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.durations import Duration
from rqvae.errors import RunFailed
from rqvae.models.ema import EMA
from rqvae.models.power_ema import PowerEMA, Profile, exponent_of
from rqvae.trainers import checkpoint
from rqvae.trainers.finite import first_not_finite
from rqvae.trainers.parts import on_main

log = logging.getLogger(__name__)


@dataclass
class EmaSnapshots(Observer):
    """Keeps the averages of every moment that is due.

    Args:
        backend: this rank; rank 0 writes.
        module: name of the averaged module, for example `stage1`.
        averages: the power-function averages.
        every: how often.
        dtype: fp16, or fp32; a tensor with values beyond fp16 stays fp32.
    """

    backend: Backend
    module: str
    averages: Sequence[PowerEMA]
    every: Duration
    dtype: Literal["fp16", "fp32"]

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if not run.clock.due(self.every):
            return
        groups = {f"{average.name}/{self.module}": average.state_dict() for average in self.averages}
        if bad := first_not_finite(self.backend, groups):
            raise RunFailed(f"step {run.clock.step}: {bad} is not finite; no snapshot of the averages is written")
        groups = {name: whole_on_host(group, keep=self.backend.rank == 0) for name, group in groups.items()}
        on_main(self.backend, lambda: self._write(run.folder, run.clock.step, groups))

    def _write(self, run: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        folder = run / "ema_snapshots" / f"step_{step:08d}"
        if checkpoint.is_good(folder):
            return  # a resumed run comes by again, with the same numbers
        widths = {average.name: average.sigma_rel for average in self.averages}
        compact = {
            name: {key: _compact(value) if self.dtype == "fp16" else value.float() for key, value in group.items()}
            for name, group in groups.items()
        }
        checkpoint.save(folder, compact, {"step": step, "module": self.module, "sigma_rel": widths})


def snapshots_of(
    backend: Backend, module: str, ema: Sequence[EMA], every: str | int, dtype: Literal["fp16", "fp32"]
) -> list[Observer]:
    """The observer that keeps the power-function averages among `ema`; none where there are none."""
    powers = [average for average in ema if isinstance(average, PowerEMA)]
    return [EmaSnapshots(backend, module, powers, Duration.parse(every), dtype)] if powers else []


def _compact(value: Tensor) -> Tensor:
    half = value.half()
    return half if bool(half.isfinite().all()) else value.float()


@dataclass(frozen=True)
class Snapshot:
    """One average of one moment on disk.

    Args:
        folder: with COMPLETE.
        name: of its tensors' file in the folder, for example `power_ema_0.05/stage1`.
        profile: which moments it holds.
    """

    folder: Path
    name: str
    profile: Profile

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return int(self.profile.t)

    def read(self) -> dict[str, Tensor]:
        """Its tensors, fp16 or fp32."""
        return checkpoint.read(self.folder, self.name)


def read_snapshots(run: Path) -> list[Snapshot]:
    """The complete snapshots of a run, oldest first; half-written ones are left out."""
    found = []
    for folder in sorted((run / "ema_snapshots").glob("step_*")):
        if checkpoint.is_good(folder):
            meta = checkpoint.read_meta(folder)
            found += [
                Snapshot(folder, f"{name}/{meta['module']}", Profile(exponent_of(width), meta["step"]))
                for name, width in meta["sigma_rel"].items()
            ]
    return found


def weighted_sum(snapshots: Sequence[Snapshot], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The snapshots' tensors times their coefficients, summed in fp64, one snapshot in memory at a time.

    What is the same in all of them (position tables, frozen weights) is left out: the coefficients' sum is not exactly
    1, nor is fp16 exact.

    Raises:
        BadInput: a damaged snapshot.
    """
    total: dict[str, Tensor] = {}
    for folder in {snapshot.folder for snapshot in snapshots}:
        checkpoint.verify(folder)
    first, changed = snapshots[0].read(), set()
    for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
        for key, value in snapshot.read().items():
            term = value.to(torch.float64) * coefficient
            total[key] = total[key] + term if key in total else term
            if key not in changed and not torch.equal(value, first[key]):
                changed.add(key)
    return {key: value for key, value in total.items() if key in changed or len(snapshots) == 1}
