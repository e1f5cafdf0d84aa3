"""Learning rates that follow from a config and the program's source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rqvae.health.settings import Setting
from rqvae.health.subject import Subject

_DIV, _FINAL, _SHARE = 25.0, 1e4, 0.3


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step.

    Args:
        name: constant, linear, cosine or one-cycle.
        peak: largest rate.
        steps: length of the whole schedule.
        warmup: steps of the linear rise; of one-cycle 30 % are a cosine rise.
        settings: where it is stated.
    """

    name: str
    peak: float
    steps: float
    warmup: float
    settings: tuple[Setting, ...]

    def at(self, step: np.ndarray) -> np.ndarray:
        """Rate (n,) at steps (n,).

        Source: torch.optim.lr_scheduler.OneCycleLR (two cosines that end at pct_start * total - 1 and total - 1);
        transformers.get_scheduler for the others.
        """
        step = np.asarray(step, dtype=np.float64)
        if self.name == "one-cycle":
            top, end = _SHARE * self.steps - 1, self.steps - 1
            low, last = self.peak / _DIV, self.peak / _DIV / _FINAL
            up = _cosine(low, self.peak, step / top if top > 0 else np.ones_like(step))
            down = _cosine(self.peak, last, np.clip((step - top) / max(end - top, 1e-9), 0, 1))
            return np.where((step <= top) & (top > 0), up, down)
        share = np.clip((step - self.warmup) / max(self.steps - self.warmup, 1), 0, 1)
        decay = {"linear": 1 - share, "cosine": 0.5 * (1 + np.cos(np.pi * share))}.get(self.name, np.ones_like(step))
        return self.peak * np.where(step < self.warmup, step / max(self.warmup, 1), decay)


def _cosine(start: float, end: float, share: np.ndarray) -> np.ndarray:
    return end + (start - end) / 2 * (1 + np.cos(np.pi * share))


def schedule_of(subject: Subject) -> Schedule | None:
    """The schedule that config, log and source state; None if a part of it is missing.

    A one-cycle schedule may be named by the source alone (a call of `OneCycleLR`), where the config names none.
    """
    lr, steps, named = (subject.setting(name) for name in ("lr", "steps", "scheduler"))
    if lr is None or not lr.number or steps is None or not steps.number:
        return None
    settings = [lr, steps]
    text = str(named.value).lower() if named else ""
    if named:
        settings.append(named)
    elif subject.source is not None and not any("schedule" in setting.key for setting in subject.stated):
        for file, call in subject.source.calls("OneCycleLR"):
            text = "onecycle"
            settings.append(Setting("scheduler", file.text(call), file.name, call.lineno))
            break
    kinds = {
        "onecycle": "one-cycle",
        "one_cycle": "one-cycle",
        "cosine": "cosine",
        "linear": "linear",
        "constant": "constant",
    }
    kind = next((name for word, name in kinds.items() if word in text), None)
    if kind is None or ("restart" in text):
        return None
    return Schedule(kind, lr.number, steps.number, subject.number("warmup") or 0.0, tuple(settings))
