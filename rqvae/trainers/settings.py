"""The settings of training, checkpoints and logs: each key of those config sections is documented here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rqvae.backends import Precision
from rqvae.diffusion.sampling import Sampler
from rqvae.durations import Duration, DurationText
from rqvae.errors import BadInput
from rqvae.metrics.extractors import Extractor

OnlineMetric = Literal["psnr", "ssim", "lpips", "rfid", "gfid", "sfid", "is"]


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
        initial_weights: run, checkpoint or exported folder, or URL, whose evaluated weights the trained model begins
            with; steps, moments and averages begin anew (`--resume-ckpt` goes on with them). A run that is resumed does
            not read it again.
        seed: what every random number of the run is keyed by.
        precision: fp32; bf16 or fp16 (autocast; weights, EMA and optimizer state stay fp32); fp64. The loss of fp16 is
            scaled, each update's by its own scale: a step whose gradients overflow is skipped and halves it.
        compile: compile the repeated blocks of the trained model (torch.compile), each kind of block and shape once:
            some time at the start for faster steps. Sums are taken in another order, and dropout draws other numbers.
        compile_plan: file that `diagnose` wrote: compile exactly the submodules of Stage1 that it lists, with its cuts.
        activation_checkpointing: blocks keeps only the inputs of the trained model's repeated blocks for the backward
            pass and computes the rest again: the same numbers and less memory for about a third more time.
        parallel: data, every process holds all of the trained models (DDP); sharded, each holds its part of weights,
            gradients, moments and averages and gathers a repeated block when it is computed (FSDP2): for a model that
            does not fit a device, at the price of traffic. The same numbers but for rounding; a run may go on with the
            other one, and a single process holds all with either.
        accumulate: micro-batches of one optimizer step.
        log_every: how often a row is written to metrics.jsonl.
        noise: per_sample keys every random number by the sample, so that a run does not depend on world size or
            accumulation; per_rank draws on the device from one generator a rank, seeded by (seed, rank, step): for
            large pixel models, where the host's numbers would be the bottleneck. It resumes exactly at the same world
            size and accumulation only.
        channels_last: memory format of convolutional models.
        threads: OpenMP threads of a process, 0 to leave torch's choice.
        stop_check_seconds: how often the ranks agree on whether a signal asked one of them to stop.
        peak_tflops: dense peak of one device at the run's precision, in 10^12 operations a second, that train/mfu is
            measured against; null takes it from a table of devices and leaves train/mfu out where it is not there.
        skip_nonfinite: an update whose gradients are not finite is left out, on all ranks, with weights, moments and
            averages as they were, up to so many times in a row; once more stops the run. 0 stops it at the next row.
        skip_spikes: with `skip_nonfinite`, an update is also left out whose gradients' norm is more than so many times
            the running mean over about 100 updates (after the first 100); null leaves out none.
    """

    steps: DurationText = "100k steps"
    initial_weights: str | None = None
    seed: int = 0
    precision: Precision = "fp32"
    compile: bool = False
    compile_plan: str | None = None
    activation_checkpointing: Literal["none", "blocks"] = "none"
    parallel: Literal["data", "sharded"] = "data"
    accumulate: int = 1
    log_every: DurationText = "50 steps"
    noise: Literal["per_sample", "per_rank"] = "per_sample"
    channels_last: bool = False
    threads: int = 0
    stop_check_seconds: float = 2.0
    peak_tflops: float | None = None
    skip_nonfinite: int = 0
    skip_spikes: float | None = None

    def __post_init__(self) -> None:
        _check_durations("train", steps=self.steps, log_every=self.log_every)
        if self.compile and self.compile_plan is not None:
            raise BadInput(f"train.compile_plan: expected null with train.compile, got {self.compile_plan}")
        _at_least("train", 1, accumulate=self.accumulate)
        _at_least("train", 0, threads=self.threads, stop_check_seconds=self.stop_check_seconds)
        _at_least("train", 0, skip_nonfinite=self.skip_nonfinite)
        if self.skip_spikes is not None:
            _at_least("train", 1, skip_spikes=self.skip_spikes)
            if self.skip_nonfinite < 1 or self.precision == "fp16":
                raise BadInput(
                    "train.skip_spikes: expected train.skip_nonfinite of at least 1 and a precision other than fp16, "
                    f"got {self.skip_nonfinite} and {self.precision}"
                )
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise BadInput(f"train.peak_tflops: expected more than 0 or null, got {self.peak_tflops}")
        if Duration.parse(self.steps).unit == "percent":
            raise BadInput(f"train.steps: expected steps, images or epochs, got {self.steps}")


@dataclass(frozen=True)
class BestSettings:
    """Which checkpoint is the best.

    Args:
        metric: name in metrics.jsonl, for example val/psnr or train/loss_total. A checkpoint is written at once where a
            row has a better value than all before it.
        mode: max where more is better.
    """

    metric: str
    mode: Literal["max", "min"] = "max"

    def better(self, value: float, than: float | None) -> bool:
        """Whether `value` is finite and better than the best so far (None: there was none)."""
        return math.isfinite(value) and (than is None or (value > than if self.mode == "max" else value < than))


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and which stay.

    Args:
        every: how often; the last step always writes one.
        keep_last: how many of the newest stay.
        keep_every: checkpoints at multiples of this duration stay too.
        best: the checkpoint with the best value of a metric stays too; null is none.
        asynchronous: copy to the host's memory in the step, and write the files while training goes on. The next
            checkpoint, the end of the run and a signal wait for it. Takes memory for a copy of all that is saved.
        final_model: write the autoencoder as RUN/final_model/vae in diffusers' format after the last step (Stage1).
    """

    every: DurationText = "5k steps"
    keep_last: int = 2
    keep_every: DurationText | None = None
    best: BestSettings | None = None
    asynchronous: bool = False
    final_model: bool = False

    def __post_init__(self) -> None:
        _check_durations("checkpoint", every=self.every, keep_every=self.keep_every)
        _at_least("checkpoint", 1, keep_last=self.keep_last)


@dataclass(frozen=True)
class EmaSettings:
    """Running averages of the trained weights.

    Args:
        decays: one average a decay; without one, and without `power`, the weights themselves are evaluated.
        warmup: shorter memory in the first steps, min(decay, (1 + n) / (10 + n)); of `decays` only.
        every: steps between two updates of `decays`, which then count updates and not steps.
        power: power-function averages (Karras et al. 2024) by their relative width sigma_rel, in (0, 0.2886], for
            example [0.05, 0.10]. Their snapshots stay in RUN/ema_snapshots, from which `python -m rqvae ema` puts
            together an average of any other width after training.
        snapshot_every: how often these snapshots are taken. 20 of two widths give 0.075 with a profile within 0.3 %.
        snapshot_dtype: fp16 halves the disk they take; a tensor with values beyond its range stays fp32.
        evaluate: name of the average that is evaluated, such as ema_0.9999 or power_ema_0.05; null is the first of
            `decays`, else the first of `power`.
    """

    decays: list[float] = field(default_factory=lambda: [0.9999])
    warmup: bool = True
    every: int = 1
    power: list[float] = field(default_factory=list)
    snapshot_every: DurationText = "5%"
    snapshot_dtype: Literal["fp16", "fp32"] = "fp16"
    evaluate: str | None = None

    def __post_init__(self) -> None:
        if any(not 0 <= decay < 1 for decay in self.decays) or len(set(self.decays)) < len(self.decays):
            raise BadInput(f"ema.decays: expected different numbers in [0, 1), got {self.decays}")
        if any(not 0 < width <= 12**-0.5 for width in self.power) or len(set(self.power)) < len(self.power):
            raise BadInput(f"ema.power: expected different numbers in (0, 0.2886], got {self.power}")
        _at_least("ema", 1, every=self.every)
        _check_durations("ema", snapshot_every=self.snapshot_every)
        names = [f"ema_{decay:g}" for decay in self.decays] + [f"power_ema_{width:g}" for width in self.power]
        if self.evaluate is not None and self.evaluate not in names:
            raise BadInput(f"ema.evaluate: expected one of {', '.join(names) or 'none'}, got {self.evaluate}")


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
class SampleSettings(PictureSettings):
    """Grids of samples. Of a world model: context | true next frame | predicted one, and a film of dreams.

    Conditions and noise are the same each time, so that the pictures of a run can be compared.

    Args:
        every: how often.
        images: pictures in a grid; windows of a world model.
        vis_sampler: solver, steps, spacing and guidance of the pictures; null is the model's own. For example
            `{solver: rqvae.diffusion.solvers.dpm_solver_pp_2m, steps: 20, shift: 3.0}` (DPM-Solver++ of order 2).
        frames: of the film of a world model, for recordings whose episodes can be read in order; 0 is no film.
    """

    vis_sampler: Sampler | None = None
    frames: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("pictures", 0, frames=self.frames)


@dataclass(frozen=True)
class OnlineEvalSettings:
    """Scores while training: of reconstructions of the validation split (Stage1), or of generated images (Stage2).

    Args:
        every: how often; null switches it off.
        images: how many images of the split are reconstructed, or how many are generated; 0 is as many as the split
            has.
        metrics: which scores. Of Stage1: psnr, ssim, lpips, rfid, sfid, is; of Stage2: gfid, sfid, is. rfid and gfid
            are the Fréchet distance of the extractor's features; sfid and is need the extractor inception.
        extractor: inception, or random-vgg16, which needs no download and whose distance is called fd_random_vgg16, or
            the class of another one.
        reference: npz of features or statistics that images are compared with, written by `python -m rqvae
            make-reference`, by another run or by another program; null is the validation split, whose statistics are
            kept in SAVE_DIR/PROJECT/references. Also `--fid_gt_act_path`.
        save_features: write the features beside the statistics of RUN/eval, in the form that `reference` takes.
        batch_size: images of one forward on each rank, where an extractor or a generator is used; the result does not
            depend on the number of ranks.
        lpips_net: network of lpips.
        lpips_weights: file or URL (its name ends in -SHA256.pth) of its weights; null is torchvision's URL.
    """

    every: DurationText | None = "1 epochs"
    images: int = 0
    metrics: list[OnlineMetric] = field(default_factory=lambda: ["psnr", "ssim"])
    extractor: Literal["inception", "random-vgg16"] | Extractor = "inception"
    reference: str | None = None
    save_features: bool = False
    batch_size: int = 32
    lpips_net: Literal["alex", "vgg"] = "alex"
    lpips_weights: str | None = None

    def __post_init__(self) -> None:
        _check_durations("online_eval", every=self.every)
        _at_least("online_eval", 0, images=self.images)
        _at_least("online_eval", 1, batch_size=self.batch_size)
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise BadInput(f"online_eval.metrics: expected one or more different ones, got {self.metrics}")
