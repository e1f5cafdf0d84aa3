"""What a run is, as far as its log and config say: each fact with its place, else "not stated"."""

from __future__ import annotations

from dataclasses import dataclass

from rqvae.health.settings import Setting
from rqvae.health.subject import Subject

NOT_STATED = "not stated"
_ASKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("parameters", ("total parameters", "dit parameters", "sit parameters", "lightningdit parameters", "parameters")),
    ("trainable parameters", ("trainable parameters",)),
    ("model size", ("dim", "model dimension", "hidden_size", "model", "backbone.class_path")),
    ("classes", ("num_classes", "number of classes")),
    ("image size", ("image_size", "resolution", "data.dataset.init_args.size")),
    ("network input", ("network input shape",)),
    ("data", ("data_folder", "data path", "data_dir", "data_path", "root")),
    ("training images", ("dataset images", "train set summary")),
    ("batch size", ("global batch size", "global_batch_size", "batch_size", "batch size", "train_batch_size")),
    ("accumulation", ("gradient_accumulate_every", "gradient_accumulation_steps")),
    ("optimizer", ("optimizer", "optim", "optimizer.class_path")),
    ("learning rate", ("lr", "learning_rate", "train_lr")),
    ("schedule", ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule")),
    ("steps", ("train_num_steps", "max_steps", "total steps", "train.steps", "steps")),
    ("epochs", ("epochs", "num_train_epochs", "num_epochs")),
    ("objective", ("objective", "prediction", "prediction_type", "parameterization")),
    ("timesteps", ("timesteps", "diffusion_steps", "num_train_timesteps")),
    ("sampling steps", ("sampling_timesteps", "num_sampling_steps")),
    ("precision", ("precision", "mixed_precision", "network input dtype", "fp16", "use_fp16")),
    ("average of weights", ("ema_decay", "ema_rate", "ema.decays")),
    ("starts from", ("starts from", "resume_checkpoint", "milestone", "ckpt")),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One fact: `place` is FILE:LINE, "" for what is counted or not stated."""

    name: str
    value: str
    place: str = ""


def inventory(subject: Subject) -> tuple[Item, ...]:
    """What was read and what the run states."""
    log = subject.log
    counted = [
        Item("log", f"{log.path.name}, {log.lines} lines, {log.size} bytes"),
        Item("format", log.format + (f" (trust {log.trust:g})" if log.trust < 1 else "")),
        Item("runs in the file", str(len(log.segments))),
    ]
    if (loss := subject.loss) is not None and len(loss):
        span = f"{loss.steps[0]:g} to {loss.steps[-1]:g} {log.unit}s"
        place = f"{log.path.name}:{loss.lines[0]}-{loss.lines[-1]}"
        counted.append(
            Item(
                "training loss",
                f"{loss.name}: {len(loss)} points, {span}, {loss.values[0]:.5g} to {loss.values[-1]:.5g}",
                place,
            )
        )
    counted.append(Item("series", ", ".join(f"{n} ({len(s)})" for n, s in list(subject.segment.series.items())[:30])))
    for note in log.notes:
        counted.append(Item("reader's note", note))
    return (*counted, *(_asked(subject.stated, name, keys) for name, keys in _ASKED))


def _asked(stated: tuple[Setting, ...], name: str, keys: tuple[str, ...]) -> Item:
    for key in keys:
        for setting in stated:
            spelt = setting.key.lower()
            if (spelt == key or spelt.endswith(f".{key}")) and setting.value not in (None, "None", ""):
                return Item(name, str(setting.value)[:120], f"{setting.file}:{setting.line}")
    return Item(name, NOT_STATED)


def told(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """For people: what is stated, and the names of all that is not in one row."""
    missing = ", ".join(item.name for item in items if item.value == NOT_STATED)
    stated = tuple(item for item in items if item.value != NOT_STATED)
    return (*stated, Item(NOT_STATED, missing)) if missing else stated
