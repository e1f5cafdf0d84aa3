"""How fast a run is: images and operations per second in the log, a progress bar on the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.durations import Duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A part of an optimizer step's operations.

    Args:
        flops: floating-point operations for one image, 2 for each multiply-add.
        starts: first optimizer step (0 is the run's first) at which it is done.
    """

    flops: float
    starts: int = 0


@dataclass
class Throughput(Observer):
    """How fast the run was since the last row, in every row of training values.

    `train/images_per_s` over all ranks, `train/images_per_s_device`, `train/tflops_per_s_device` (10^12 floating-point
    operations a second that the model asks for), `train/mfu` (the same by the device's peak, in [0, 1]; model FLOPs
    utilisation, Chowdhery et al. 2022, appendix B: what is computed again to save memory does not count). All four are
    of the whole loop, pictures, scores and checkpoints in the window included.

    The window ends at the step whose row is written; an asynchronous device may lag behind it by the steps it has in
    its queue, which is a small share of a window. The first step of a
    process, with its warm-up, is left out, unless the row after it has nothing else.

    Args:
        every: the log's interval.
        work: operations of a step; empty where they could not be counted.
        devices: ranks.
        peak_tflops: dense peak of one device; None leaves `train/mfu` out.
        notes: what the log says once, at the start: which of the four are left out, and why.
    """

    every: Duration
    work: Sequence[Work] = ()
    devices: int = 1
    peak_tflops: float | None = None
    notes: Sequence[str] = ()
    _since: float = field(default=0.0, init=False)
    _images: int = field(default=0, init=False)
    _step: int = field(default=0, init=False)
    _warming_up: bool = field(default=True, init=False)

    def on_fit_start(self, run: RunView) -> None:
        for note in self.notes if run.is_main else ():
            log.info("%s", note)
        self._begin(run)

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        due = run.clock.due(self.every)
        if due:
            seconds = max(1e-9, time.monotonic() - self._since)
            run.log_scalars(self._speeds(run.clock.images - self._images, run.clock.step, seconds))
        if due or self._warming_up:
            self._begin(run)
        self._warming_up = False

    def _begin(self, run: RunView) -> None:
        self._since, self._images, self._step = time.monotonic(), run.clock.images, run.clock.step

    def _speeds(self, images: int, step: int, seconds: float) -> dict[str, Tensor | float]:
        per_device = images / seconds / self.devices
        speeds: dict[str, Tensor | float] = {
            "train/images_per_s": images / seconds,
            "train/images_per_s_device": per_device,
        }
        if self.work:
            # mean over the window's steps: a discriminator may have started within it
            done = [work.flops * max(0, step - max(work.starts, self._step)) for work in self.work]
            tflops = sum(done) / (step - self._step) * per_device / 1e12
            speeds["train/tflops_per_s_device"] = tflops
            if self.peak_tflops:
                speeds["train/mfu"] = tflops / self.peak_tflops
        return speeds


class Progress(Observer):
    """A bar with steps, it/s, images/s and the time left; rank 0 only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._since, self._images = 0.0, 0

    def on_fit_start(self, run: RunView) -> None:
        if run.is_main:
            clock = run.clock
            self._bar = tqdm(
                total=clock.total_steps,
                initial=clock.step,
                desc=run.folder.name,
                unit="it",
                mininterval=1 if sys.stderr.isatty() else 30,  # a file does not want a line a second
            )
            self._since, self._images = time.monotonic(), clock.images

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if self._bar is not None:
            rate = (run.clock.images - self._images) / max(1e-9, time.monotonic() - self._since)
            self._bar.set_postfix_str(f"{rate:.0f} images/s, epoch {run.clock.epoch:.2f}", refresh=False)
            self._bar.update(run.clock.step - self._bar.n)

    def on_fit_end(self, run: RunView) -> None:  # noqa: ARG002
        if self._bar is not None:
            self._bar.close()
