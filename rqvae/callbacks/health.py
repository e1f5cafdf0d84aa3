"""`python -m rqvae health` while a run trains: the same functions, in a process of their own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rqvae.callbacks.interfaces import Intervention, LossView, Observer, RunView, UpdateView
from rqvae.callbacks.strata import LossStrata
from rqvae.durations import Duration, DurationText
from rqvae.errors import BadInput
from rqvae.health.finding import SEVERITIES
from rqvae.health.live import LOOKS
from rqvae.img_datasets.interfaces import LabeledImageData

log = logging.getLogger(__name__)
Severity = Literal["info", "minor", "major", "critical"]
LOOK = ["health", "look"]
_LAST_LOOK_SECONDS = 60.0


class Health(Observer):
    """Examines the run's own log now and then; what is new is a warning in log.txt, all of it a line of health.jsonl.

    Rank 0 starts `python -m rqvae health look` with low priority, so that neither the device nor the loop waits; the
    next look begins when the last one is done. The losses by diffusion time and class, which some checks need, are
    added to the rows (`LossStrata`).

    Args:
        every: between looks.
        warn: the least severity that is a warning.
        t_bins: parts of the diffusion time, see `LossStrata`.
        classes: the most classes that are told apart.
    """

    def __init__(
        self, every: DurationText = "500 steps", warn: Severity = "major", t_bins: int = 4, classes: int = 20
    ) -> None:
        try:
            self._every = Duration.parse(every)
        except BadInput as error:
            raise BadInput(f"Health.every: {error}") from None
        self._warn, self._strata = warn, LossStrata(t_bins, classes)
        self._process: subprocess.Popen[str] | None = None
        self._known: set[tuple[str, str]] = set()

    def on_fit_start(self, run: RunView) -> None:
        """After a resume only what is new since the looks before it is told."""
        if run.is_main and (run.folder / LOOKS).exists():
            for line in (run.folder / LOOKS).read_text(encoding="utf-8").splitlines():
                self._known |= {(f["id"], f["severity"]) for f in json.loads(line)["findings"]}

    def after_loss(self, run: RunView, update: UpdateView, micro: LabeledImageData, losses: LossView) -> None:
        """Samples of the strata."""
        self._strata.after_loss(run, update, micro, losses)

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Take a look that is done; begin one that is due."""
        if not run.is_main:
            return
        if self._process is not None and self._process.poll() is not None:
            self._take(run, *self._process.communicate())
        if self._process is None and run.clock.due(self._every) and (run.folder / "metrics.jsonl").exists():
            self._begin(run.folder)

    def on_fit_end(self, run: RunView) -> None:
        """One more look, at all rows."""
        if not run.is_main or not (run.folder / "metrics.jsonl").exists():
            return
        if self._process is not None:
            self._wait(run)
        self._begin(run.folder)
        self._wait(run)

    def found(self, run: RunView, finding: dict[str, Any]) -> None:  # noqa: ARG002
        """Something new: a warning where it is severe enough."""
        if SEVERITIES.index(finding["severity"]) >= SEVERITIES.index(self._warn):
            log.warning("health: %s %s: %s", finding["severity"], finding["id"], finding["message"])

    def _begin(self, folder: Path) -> None:
        command = [sys.executable, "-m", "rqvae", *LOOK, str(folder)]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run
        )

    def _wait(self, run: RunView) -> None:
        assert self._process is not None
        try:
            self._take(run, *self._process.communicate(timeout=_LAST_LOOK_SECONDS))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process = None
            log.warning("health: a look took more than %.0f s and was given up", _LAST_LOOK_SECONDS)

    def _take(self, run: RunView, line: str, errors: str) -> None:
        assert self._process is not None
        code, self._process = self._process.returncode, None
        if code != 0:  # the analyser's trouble is not the run's
            last = (errors.strip().splitlines() or ["no words"])[-1]
            log.warning("health: no look, exit code %d: %s", code, last)
            return
        with (run.folder / LOOKS).open("a", encoding="utf-8") as file:
            file.write(line)
        for finding in json.loads(line)["findings"]:
            if (key := (finding["id"], finding["severity"])) not in self._known:
                self._known.add(key)
                self.found(run, finding)


class HealthGuard(Health, Intervention):
    """`Health` that acts, on all ranks in the same step: belongs under `interventions`.

    A step can also be left out as it happens, by `train.skip_nonfinite` and `train.skip_spikes`.

    Args:
        every: between looks.
        warn: the least severity that is a warning.
        checkpoint: the least severity at which a checkpoint is written; null never asks for one.
        stop: the least severity at which the run ends with exit code 3, without another checkpoint; null goes on.
        t_bins: parts of the diffusion time, see `LossStrata`.
        classes: the most classes that are told apart.
    """

    def __init__(
        self,
        every: DurationText = "500 steps",
        warn: Severity = "major",
        checkpoint: Severity | None = None,
        stop: Severity | None = "critical",
        t_bins: int = 4,
        classes: int = 20,
    ) -> None:
        super().__init__(every, warn, t_bins, classes)
        self._checkpoint, self._stop = checkpoint, stop

    def found(self, run: RunView, finding: dict[str, Any]) -> None:
        """A warning, then what the guard is to do."""
        super().found(run, finding)
        severity, why = SEVERITIES.index(finding["severity"]), f"health: {finding['id']}: {finding['message']}"
        if self._stop is not None and severity >= SEVERITIES.index(self._stop):
            run.ask("stop", why)
        elif self._checkpoint is not None and severity >= SEVERITIES.index(self._checkpoint):
            run.ask("checkpoint", why)
