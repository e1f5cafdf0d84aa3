"""The settings of training, checkpoints and logs: each key of those config sections is documented here, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rqvae.backends import Precision
from rqvae.durations import Duration, DurationText
from rqvae.errors import BadInput


def _check_durations(section: str, **durations: DurationText | None) -> None:
    for name, value in durations.items():
        if value is not None:
            try:
                Duration.parse(value)
            except BadInput as error:
                raise BadInput(f"{section}.{name}: {error}") from None


def _at_least(section: str, least: float, **numbers: float) -> None:
    for name, value in numbers.items():
        if value < least:
            raise BadInput(f"{section}.{name}: expected at least {least}, got {value}")


@dataclass(frozen=True)
class TrainSettings:
    """How long and how.

    Args:
        steps: length of the run: `20k steps`, `5M images`, `100 epochs`; a bare integer means optimizer steps.
        seed: what every random number of the run is keyed by.
        precision: fp32, bf16 (autocast; weights, EMA and optimizer state stay fp32) or fp64.
        accumulate: micro-batches of one optimizer step.
        log_every: how often a row is written to metrics.jsonl.
        noise: per_sample keys every random number by the sample, so that a run does not depend on world size or
            accumulation; per_rank draws on the device from one generator a rank, seeded by (seed, rank, step): for
            large pixel models, where the host's numbers would be the bottleneck. It resumes exactly at the same world
            size and accumulation only.
        channels_last: memory format of convolutional models.
        threads: OpenMP threads of a process, 0 to leave torch's choice.
        stop_check_seconds: how often the ranks agree on whether a signal asked one of them to stop.
    """

    steps: DurationText = "100k steps"
    seed: int = 0
    precision: Precision = "fp32"
    accumulate: int = 1
    log_every: DurationText = "50 steps"
    noise: Literal["per_sample", "per_rank"] = "per_sample"
    channels_last: bool = False
    threads: int = 0
    stop_check_seconds: float = 2.0

    def __post_init__(self) -> None:
        _check_durations("train", steps=self.steps, log_every=self.log_every)
        _at_least("train", 1, accumulate=self.accumulate)
        _at_least("train", 0, threads=self.threads, stop_check_seconds=self.stop_check_seconds)
        if Duration.parse(self.steps).unit == "percent":
            raise BadInput(f"train.steps: expected steps, images or epochs, got {self.steps}")


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and which stay.

    Args:
        every: how often; the last step always writes one.
        keep_last: how many of the newest stay.
        keep_every: checkpoints at multiples of this duration stay too.
    """

    every: DurationText = "5k steps"
    keep_last: int = 2
    keep_every: DurationText | None = None

    def __post_init__(self) -> None:
        _check_durations("checkpoint", every=self.every, keep_every=self.keep_every)
        _at_least("checkpoint", 1, keep_last=self.keep_last)


@dataclass(frozen=True)
class EmaSettings:
    """Running averages of the trained weights; the first one is what is evaluated.

    Args:
        decays: one average a decay; an empty list trains without and evaluates the weights themselves.
        warmup: shorter memory in the first steps, min(decay, (1 + n) / (10 + n)).
    """

    decays: list[float] = field(default_factory=lambda: [0.9999])
    warmup: bool = True

    def __post_init__(self) -> None:
        if any(not 0 <= decay < 1 for decay in self.decays) or len(set(self.decays)) < len(self.decays):
            raise BadInput(f"ema.decays: expected different numbers in [0, 1), got {self.decays}")


@dataclass(frozen=True)
class LogSettings:
    """Where the log of record, metrics.jsonl, is mirrored to.

    Args:
        tensorboard: write TensorBoard events.
        wandb: online, offline or disabled. auto takes WANDB_MODE if set, else online where a W&B key is configured,
            else offline, and says which in log.txt.
        progress: a progress bar on the terminal of rank 0.
    """

    tensorboard: bool = True
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    progress: bool = True


@dataclass(frozen=True)
class PictureSettings:
    """Grids of reconstructions and samples.

    Args:
        every: how often.
        images: pictures in a grid.
    """

    every: DurationText | None = "0.5 epochs"
    images: int = 8

    def __post_init__(self) -> None:
        _check_durations("pictures", every=self.every)
        _at_least("pictures", 1, images=self.images)


@dataclass(frozen=True)
class OnlineEvalSettings:
    """Evaluation on the validation split while training.

    Args:
        every: how often; null switches it off.
        images: how many images of the split, 0 for all.
        metrics: which scores.
    """

    every: DurationText | None = "1 epochs"
    images: int = 0
    metrics: list[Literal["psnr", "ssim"]] = field(default_factory=lambda: ["psnr", "ssim"])

    def __post_init__(self) -> None:
        _check_durations("online_eval", every=self.every)
        _at_least("online_eval", 0, images=self.images)
