"""What a run was asked to do: keys of a config file and facts that a log states, under any of their usual names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqvae.errors import BadInput

NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("lr", "learning_rate", "train_lr", "base_lr", "max_lr", "optimizer.lr"),
    "steps": ("train_num_steps", "max_steps", "total_steps", "max_train_steps", "num_steps", "train.steps", "steps"),
    "epochs": ("epochs", "num_epochs", "num_train_epochs", "max_epochs", "n_epochs"),
    "batch": ("global batch size", "global_batch_size", "batch_size", "train_batch_size", "batch size"),
    "accumulation": ("gradient_accumulation_steps", "gradient_accumulate_every", "accumulate_grad_batches"),
    "dataset": ("dataset images", "num_examples", "dataset_size"),
    "objective": ("objective", "prediction_type", "prediction", "pred_type", "parameterization", "model_target"),
    "loss_type": ("loss_type", "loss_fn", "recon_loss"),
    "scheduler": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule", "schedule"),
    "warmup": ("warmup_steps", "num_warmup_steps", "lr_warmup_steps", "lr_warmup", "warmup"),
    "clip": ("max_grad_norm", "grad_clip", "clip_grad_norm", "gradient_clip_val", "clip_norm", "clip"),
    "pretrained": ("starts from", "resume", "resume_checkpoint", "pretrained", "ckpt", "init_from", "finetune",
                   "milestone", "pretrained_model_name_or_path", "resume_from_checkpoint"),
    "ema_decay": ("ema_decay", "ema_rate", "decay", "ema.decays"),
    "ema_after": ("update_after_step", "ema_update_after_step", "ema_start"),
    "sample_every": ("save_sample_every", "save_and_sample_every", "sample_every", "samples.every"),
    "timesteps": ("timesteps", "diffusion_steps", "num_timesteps", "num_train_timesteps"),
    "drop": ("cond_drop_prob", "class_dropout_prob", "p_uncond", "uncond_prob", "Conditional drop probability"),
    "classes": ("num_classes", "Number of classes"),
    "channels": ("channels", "in_channels", "latent_channels", "Input channels"),
    "workers": ("num_workers", "workers"),
    "learn_sigma": ("learn_sigma", "learned_variance"),
    "latent": ("vae", "first_stage", "latent_channels", "norm_scale", "latent_scale", "scale_factor", "stage1"),
}  # fmt: skip
"""Spellings of each setting, the surest first."""


@dataclass(frozen=True)
class Setting:
    """A value with its place."""

    key: str
    value: Any
    file: str
    line: int

    @property
    def number(self) -> float | None:
        """As a number, `1,281,167` and `675.26M` included; None if it is none."""
        if isinstance(self.value, bool) or self.value is None:
            return None
        text = str(self.value).replace(",", "").strip()
        scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1.0)
        try:
            return float(text if scale == 1 else text[:-1]) * scale
        except ValueError:
            return None


def read_settings(path: Path) -> tuple[Setting, ...]:
    """All leaves of a YAML or JSON file by their dotted keys, each with its line.

    Raises:
        BadInput: no such file, or it is no YAML.
    """
    import yaml

    if not path.is_file():
        raise BadInput(f"--config {path}: expected a config, there is no such file")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8", errors="replace"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise BadInput(
            f"--config {path}: line {line}: expected YAML or JSON, {getattr(error, 'problem', error)}"
        ) from None
    if node is None or not isinstance(node, yaml.MappingNode):
        raise BadInput(
            f"--config {path}: expected keys and values, got {'nothing' if node is None else 'something else'}"
        )
    return tuple(_leaves(node, "", path.name))


def _leaves(node: Any, prefix: str, file: str) -> Iterator[Setting]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if type(value_node).__name__ == "MappingNode":
            yield from _leaves(value_node, f"{key}.", file)
        else:
            yield Setting(key, _value(value_node), file, line)


def _value(node: Any) -> Any:
    if type(node).__name__ == "SequenceNode":
        return [
            _value(item) if not hasattr(item, "value") or not isinstance(item.value, list) else str(item.tag)
            for item in node.value
        ]
    text = node.value
    if node.tag.endswith(":null"):
        return None
    if node.tag.endswith(":bool"):
        return text.lower() in ("true", "yes", "on")
    try:
        return (
            int(text)
            if re.fullmatch(r"[-+]?\d+", text)
            else float(text)
            if node.tag.endswith((":float", ":str"))
            else text
        )
    except ValueError:
        return text


def find(settings: tuple[Setting, ...], name: str) -> Setting | None:
    """The first setting under one of the spellings of `name`; null, None and empty values do not count."""
    by_key: dict[str, Setting] = {}
    for setting in settings:
        by_key.setdefault(setting.key.lower(), setting)
        by_key.setdefault(setting.key.rpartition(".")[2].lower(), setting)
    for spelling in NAMES[name]:
        found = by_key.get(spelling.lower())
        if found is not None and str(found.value).lower() not in ("none", "null", "", "false", "[]"):
            return found
    return None


def as_list(value: Any) -> list[float] | None:
    """A list of numbers from a list or its text; None if it is none."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
        return [float(item) for item in items] if isinstance(items, list) else None
    except (ValueError, TypeError):
        return None
