"""Observers that tests put into configs by class_path."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from rqvae.callbacks.interfaces import Observer, RunView, UpdateView


class RankWeights(Observer):
    """Writes a hash of every module's weights on every rank at the end: `rank_R.json` in `folder`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.modules: dict[str, object] = {}

    def after_backward(self, run: RunView, update: UpdateView) -> None:
        self.modules[update.name] = update.module

    def on_fit_end(self, run: RunView) -> None:
        hashes = {
            name: hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()  # type: ignore[attr-defined]
            for name, module in self.modules.items()
        }
        (self.folder / f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(hashes))


class Slow(Observer):
    """Sleeps after each step, so that a signal meets a run that trains."""

    def __init__(self, seconds: float = 0.2) -> None:
        self.seconds = seconds

    def after_step(self, run: RunView, losses: object) -> None:  # type: ignore[override]
        time.sleep(self.seconds)
