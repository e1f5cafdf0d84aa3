"""How fast a run is: images per second in the log, a progress bar on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from rqvae.callbacks.interfaces import Observer, RunView
from rqvae.durations import Duration


@dataclass
class Throughput(Observer):
    """Images per second since the last row, over all ranks, as `train/images_per_s`.

    The window ends where a row is written, which is where an asynchronous device is waited for. The first window of a
    process, with its warm-up, is left out.

    Args:
        every: the log's interval.
    """

    every: Duration
    _since: float = field(default=0.0, init=False)
    _images: int = field(default=-1, init=False)

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if not run.clock.due(self.every):
            return
        now = time.monotonic()
        if self._images >= 0 and run.clock.images > self._images:
            run.log_scalars({"train/images_per_s": (run.clock.images - self._images) / (now - self._since)})
        self._since, self._images = now, run.clock.images


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
