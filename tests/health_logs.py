"""Logs of every format from the same curve, written as the projects write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.health.examine import Examination, examine
from rqvae.health.log import LogBuilder, RunLog
from rqvae.health.settings import Setting
from rqvae.health.source import Source

Curve = tuple[np.ndarray, np.ndarray]


def healthy(points: int = 300, every: int = 100, noise: float = 0.03, seed: int = 0, floor: float = 0.2) -> Curve:
    """Steps (n,) and a loss (n,) that falls as a power law, with noise in proportion."""
    rng = np.random.default_rng(seed)
    steps = every * np.arange(1, points + 1, dtype=float)
    level = floor + 0.9 * (1 + np.arange(points)) ** -0.6
    return steps, level * np.exp(noise * rng.standard_normal(points))


def dit(path: Path, curve: Curve, total_epochs: int | None = None) -> None:
    start, lines = datetime(2025, 1, 31, 23, 0, 0), []

    def line(seconds: float, text: str) -> None:
        lines.append(f"[\x1b[34m{start + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}\x1b[0m] {text}")

    line(0, "Experiment directory created at results/000-DiT-S-2")
    line(5, "DiT Parameters: 32,956,704")
    line(5, "Dataset contains 50,000 images (/data/train)")
    if total_epochs:
        line(5, f"Training for {total_epochs} epochs...")
    line(6, "Beginning epoch 0...")
    for i, (step, value) in enumerate(zip(*curve, strict=True)):
        line(70 + 60 * i, f"(step={int(step):07d}) Train Loss: {value:.4f}, Train Steps/Sec: {1.66:.2f}")
    line(80 + 60 * len(curve[0]), "Done!")
    path.write_text("\n".join(lines) + "\n")


def guided_csv(path: Path, curve: Curve) -> None:
    rows = [f"{0.5},{value},{value},{value},{int(step * 256)},{int(step)}" for step, value in zip(*curve, strict=True)]
    path.write_text("\n".join(["grad_norm,loss,loss_q0,loss_q1,samples,step", *rows]) + "\n")


def guided_text(path: Path, curve: Curve) -> None:
    lines = ["Logging to /tmp/openai", "creating model and diffusion...", "training..."]
    for step, value in zip(*curve, strict=True):
        cells = {"grad_norm": 0.5, "loss": value, "loss_q0": value, "loss_q1": value, "step": step}
        rule = "-" * 24
        lines += [rule, *(f"| {key:<9s} | {f'{number:<8.3g}':<8s} |" for key, number in cells.items()), rule]
    path.write_text("\n".join(lines) + "\n")


def guided_json(path: Path, curve: Curve) -> None:
    rows = [{"grad_norm": 0.5, "loss": float(v), "samples": 8, "step": int(s)} for s, v in zip(*curve, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(path: Path, curve: Curve) -> None:
    rows = [
        {"step": int(s), "images": int(8 * s), "epoch": s / 1000, "time": 1.7e9 + s, "train/loss_total": float(v)}
        for s, v in zip(*curve, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stats(path: Path, curve: Curve) -> None:
    def entry(value: float) -> dict[str, float]:
        return {"num": 512, "mean": float(value), "std": 0.1}

    rows = [
        {"Loss/loss": entry(v), "Progress/kimg": entry(s), "timestamp": 1.7e9 + s} for s, v in zip(*curve, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trainer_state(path: Path, curve: Curve, eval_losses: Sequence[tuple[float, float]] = ()) -> None:
    history: list[dict[str, float]] = [
        {"epoch": s / 1000, "learning_rate": 1e-4, "loss": float(v), "step": int(s)}
        for s, v in zip(*curve, strict=True)
    ]
    history += [{"epoch": s / 1000, "eval_loss": v, "step": int(s)} for s, v in eval_losses]
    history.sort(key=lambda row: row["step"])
    state = {
        "best_metric": None,
        "global_step": int(curve[0][-1]),
        "log_history": history,
        "max_steps": int(curve[0][-1]),
    }
    path.write_text(json.dumps(state, indent=2))


def wandb_csv(path: Path, curve: Curve) -> None:
    header = '"Step","misty-sun-3 - train_loss","misty-sun-3 - train_loss__MIN","misty-sun-3 - train_loss__MAX"'
    rows = [f'"{int(s)}","{v}","{v}","{v}"' for s, v in zip(*curve, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")


def lightning_csv(path: Path, curve: Curve) -> None:
    rows = [f"{int(s) // 1000},{int(s)},{v}," for s, v in zip(*curve, strict=True)]
    path.write_text("\n".join(["epoch,step,train_loss,val_loss", *rows]) + "\n")


def lucidrains(path: Path, curve: Curve) -> None:
    total, text = int(curve[0][-1]), ""
    for step, value in zip(*curve, strict=True):
        n = int(step) - 1
        text += (
            f"\rloss: {value:.4f}: {100 * n // total:3d}%|##        | {n}/{total} [00:{n % 60:02d}<01:00,  1.00it/s]"
        )
    path.write_text(text + "\ntraining complete\n")


def dm(path: Path, curve: Curve) -> None:
    head = "=== Final Configuration [main()] ===\nUNet config:\n  dim: 256\n\n=== Model Summary [main()] ===\n"
    steps = np.arange(1, len(curve[0]) + 1, dtype=float)
    lucidrains(path, (steps, curve[1]))
    path.write_text(head + "Total parameters: 172,101,124\n" + path.read_text())


def generic(path: Path, curve: Curve) -> None:
    rows = [f"INFO step: {int(s)} loss: {v:.6f} lr=0.0001" for s, v in zip(*curve, strict=True)]
    path.write_text("starting\n" + "\n".join(rows) + "\n")


WRITERS: dict[str, tuple[str, str, Callable[[Path, Curve], None]]] = {
    "dit": ("log.txt", "Train Loss", dit),
    "guided-csv": ("progress.csv", "loss", guided_csv),
    "guided-text": ("log.txt", "loss", guided_text),
    "guided-json": ("progress.json", "loss", guided_json),
    "rqvae": ("metrics.jsonl", "train/loss_total", ours),
    "stats-jsonl": ("stats.jsonl", "Loss/loss", stats),
    "trainer-state": ("trainer_state.json", "loss", trainer_state),
    "wandb-csv": ("export.csv", "train_loss", wandb_csv),
    "lightning-csv": ("metrics.csv", "train_loss", lightning_csv),
    "lucidrains": ("out.txt", "loss", lucidrains),
    "dm": ("log_001.txt", "loss", dm),
    "generic": ("train.log", "loss", generic),
}


def built(
    path: Path,
    series: dict[str, Any],
    steps: Any = None,
    facts: dict[str, object] | None = None,
    events: Sequence[tuple[str, str]] = (),
    form: str = "guided-csv",
) -> RunLog:
    """A log put together in memory: series by name, each (n,) at `steps` or a pair of both."""
    path.write_text("a file whose lines nobody asks for\n")
    log = LogBuilder(path, form)
    for line, (key, value) in enumerate((facts or {}).items(), 1):
        log.fact(key, value, line)
    for name, values in series.items():
        own, numbers = values if isinstance(values, tuple) else (steps, values)
        own = 100.0 * np.arange(1, len(numbers) + 1) if own is None else own
        for i, (step, value) in enumerate(zip(own, numbers, strict=True)):
            log.add(name, float(step), float(value), i + 1)
    for kind, text in events:
        log.event(kind, 10**6, text)
    return log.finish(1000)


def judged(
    log: RunLog, config: dict[str, object] | None = None, source: Source | None = None, **more: Any
) -> Examination:
    """The examination of a log with a config given as a dict."""
    leaves = tuple(Setting(key, value, "config.yaml", i) for i, (key, value) in enumerate((config or {}).items(), 1))
    return examine(log, leaves, source, **more)


def ids(examination: Examination, least: str = "info") -> set[str]:
    """Ids of the findings from a severity on."""
    order = ("info", "minor", "major", "critical")
    return {f.check.id for f in examination.findings if order.index(f.severity) >= order.index(least)}
