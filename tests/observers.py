"""Observers that tests put into configs by class_path."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rqvae.backends.sharded import whole
from rqvae.callbacks.health import HealthGuard
from rqvae.callbacks.interfaces import Observer, RunView, UpdateView
from rqvae.shards import own_part


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


class RankState(Observer):
    """What every rank ends with: hashes of all whole tensors by group, and of each block the numbers it holds."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def after_step(self, run: RunView, losses: object) -> None:  # type: ignore[override]
        if run.clock.step < run.clock.total_steps:
            return
        state, blocks, total = run.state, {}, {}  # type: ignore[attr-defined]
        groups = {f"module/{name}": module.state_dict() for name, module in state.modules.items()}
        groups |= {ema.name: ema.state_dict() for ema in state.ema}
        groups |= {f"optimizer/{update.name}": update.state_dict() for update in state.updates}
        digests = {}
        for group, tensors in groups.items():
            full = [whole(value.detach()).contiguous() for value in tensors.values()]
            digests[group] = hashlib.sha256(b"".join(v.numpy().tobytes() for v in full)).hexdigest()
        for name, module in state.modules.items():
            for i, block in enumerate(module.repeated_blocks() if hasattr(module, "repeated_blocks") else [module]):
                blocks[f"{name}/{i}"] = sum(own_part(p).numel() for p in block.parameters())
                total[f"{name}/{i}"] = sum(p.numel() for p in block.parameters())
        self.folder.mkdir(exist_ok=True)
        found = {"whole": digests, "blocks": blocks, "total": total}
        (self.folder / f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


class GuardThatFinds(HealthGuard):
    """Asks for a checkpoint after step `at`, as after a finding; it takes no looks."""

    def __init__(self, at: int) -> None:
        super().__init__(every="1000 steps", checkpoint="major")
        self.at = at

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        if run.is_main and run.clock.step == self.at:
            self.found(run, {"severity": "major", "id": "LOSS.X", "message": "it rises"})
