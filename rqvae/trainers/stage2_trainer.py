"""Training of a generator on the latents of a frozen autoencoder.

One step is: encode, connector.forward, Stage2.forward, compute_loss, update.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import Observer
from rqvae.callbacks.pictures import Films
from rqvae.callbacks.trace import Trace
from rqvae.durations import Duration
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, LabeledImageDatasetWrapper
from rqvae.img_datasets.latent_cache import LatentCache
from rqvae.metrics.grids import image_grid
from rqvae.models.connectors.statistics import ChannelStatistics
from rqvae.models.ema import EMA
from rqvae.models.interfaces import base_connector
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import Draw, generator, normal, seeded
from rqvae.run import Stage2Run
from rqvae.trainers import checkpoint
from rqvae.trainers.cache_latents import open_verified
from rqvae.trainers.clock import Clock
from rqvae.trainers.evaluation_trainer import SplitWalk, as_pictures, load_evaluated, load_stage1
from rqvae.trainers.initial_weights import load_initial
from rqvae.trainers.mask_pictures import mask_pictures
from rqvae.trainers.online_images import Samples
from rqvae.trainers.online_scores import prepare
from rqvae.trainers.parallel import wrap
from rqvae.trainers.parts import Parts, compile_planned, evaluated, float_type, make_ema, prepare_blocks
from rqvae.trainers.settings import SampleSettings
from rqvae.trainers.updates import StepLosses, Update, adamw_of
from rqvae.trainers.world_pictures import Episodes, continues_frames, dream_film, window_grid

log = logging.getLogger(__name__)


@dataclass
class Stage2Objective:
    """What the generator minimises.

    Args:
        two_stage: the frozen autoencoder, the connector and the bare generator.
        wrapped: the generator whose backward averages gradients.
    """

    two_stage: TwoStage
    wrapped: nn.Module

    def loss(self, batch: LabeledImageData, micro: int) -> StepLosses:  # noqa: ARG002
        """Loss of one micro-batch."""
        losses, output = self.two_stage.training_loss(batch, self.wrapped)
        t = (output.additional_attr or {}).get("t")
        return StepLosses(losses.loss_total, {"loss_total": losses.loss_total}, losses.per_sample, t)


def make_two_stage(run: Stage2Run) -> TwoStage:
    """The three parts of the config; shapes flow from the data to the generator. Weights from the run's seed."""
    spec = run.data.make("train")[0].spec
    connector = run.connector or base_connector()
    if (scale := run.stage1.latent_statistics()) is not None:
        connector.use_latent_scale(*scale)
    latent_shape = connector.latent_shape(run.stage1.latent_shape(spec.image_shape))
    with seeded(run.train.seed, "weights", "stage2"):
        return TwoStage(run.stage1, connector, run.stage2(latent_shape, spec), spec.image_shape)


def join_draws(*parts: dict[str, Draw]) -> dict[str, Draw]:
    """The random numbers of several modules; a name may be asked for once."""
    joined: dict[str, Draw] = {}
    for part in parts:
        if twice := joined.keys() & part.keys():
            raise BadInput(f"stage2: random numbers {sorted(twice)} are asked for by Stage1 and by Stage2")
        joined |= part
    return joined


def build(run: Stage2Run, backend: Backend, clock: Clock) -> Parts:  # noqa: ARG001  (the same signature as Stage1's)
    """Models, updates and pictures of a Stage2 run, on this rank's device."""
    stage1_hash = load_stage1(run.stage1, run.stage1_checkpoint)
    latents = open_verified(run.data, run.stage1, stage1_hash, backend)
    dtype = float_type(run.train.precision)
    two_stage = make_two_stage(run)
    modules: dict[str, nn.Module] = {"stage2": two_stage.stage2, "connector": two_stage.connector}
    load_initial(modules, run.train.initial_weights, stage1_hash)
    two_stage.to(backend.device, dtype)
    two_stage.stage2.train()
    prepare_blocks(two_stage.stage2, run.train, backend)
    compile_planned(two_stage.stage1, run.train.compile_plan, backend)
    wrapped = wrap(two_stage.stage2, run.train, backend)
    objective = Stage2Objective(two_stage, wrapped)
    spec, ema = run.data.make("train")[0].spec, make_ema(two_stage.stage2, run.ema)
    image_shape = spec.image_shape
    draws = join_draws(run.stage1.draws(image_shape), two_stage.stage2.draws(two_stage.latent_shape))
    val = SplitWalk(run.data, "val", backend, dtype)
    stage2, settings, scaler = two_stage.stage2, run.updates.generator, backend.loss_scaler()
    make = adamw_of(backend)
    update = Update("generator", stage2, wrapped, objective.loss, settings, make_optimizer=make, scaler=scaler)
    return Parts(
        modules=modules,
        updates=[update],
        ema=ema,
        draws=draws,
        counted={"stage1": run.stage1, "connector": two_stage.connector, "stage2": two_stage.stage2},
        picture=("samples", lambda: sample_grid(two_stage, val, spec, run.pictures, run.train.seed)),
        evaluate=prepare(
            run, backend, lambda walk: Samples(two_stage, spec, walk, run.train.seed, run.online_eval.images), ema
        ),
        facts={
            "stage": 2,
            "model": type(two_stage.stage2).__qualname__,
            "stage1_sha256": stage1_hash,
            "latents_rounded_to": latents and latents.rounded_to,
        },
        must_match=("stage1_sha256", "latents_rounded_to"),
        companions=_companions(run, two_stage, val, ema),
        before_start=lambda: estimate_statistics(
            two_stage, SplitWalk(run.data, "train", backend, dtype, run.stage1.draws(image_shape)), latents
        ),
        latents=latents,
    )


def _companions(run: Stage2Run, two_stage: TwoStage, val: SplitWalk, ema: Sequence[EMA]) -> list[Observer]:
    """The trace where it is asked for, the pictures of masks and the films of dreams where the data have them."""
    found: list[Observer] = [_trace(run, two_stage)] if run.debug else []
    dataset, settings = run.data.make("val")[0], run.pictures
    if settings.every and dataset.spec.num_mask_classes:
        found += mask_pictures(val, settings.images, settings.every)
    if settings.every and settings.frames and continues_frames(dataset.spec) and isinstance(dataset, Episodes):
        film = dream_film(two_stage, val, dataset.spec, settings.frames, run.train.seed, settings.vis_sampler)
        found.append(Films("rollout", Duration.parse(settings.every), lambda: evaluated(two_stage.stage2, ema), film))
    return found


def _trace(run: Stage2Run, two_stage: TwoStage) -> Observer:
    dataset, transform = run.data.make("train")
    dataset.open()
    return Trace(two_stage.stage2, LabeledImageDatasetWrapper(dataset, transform, {}, run.train.seed, shuffle=True))


def load_two_stage(run: Stage2Run, path: Path, weights: str | None = None) -> TwoStage:
    """A trained model, with the weights that are evaluated (EMA), in eval mode on the host.

    Args:
        run: the experiment, for example read from the run's own config.yaml.
        path: run or checkpoint folder.
        weights: of the generator; None is what the run evaluates, see `load_evaluated`.

    Raises:
        BadInput: other Stage1 weights than it was trained on, or another architecture.
    """
    stage1_hash = load_stage1(run.stage1, run.stage1_checkpoint)
    two_stage = make_two_stage(run)
    folder = load_evaluated(two_stage.stage2, "stage2", path, weights)
    trained_on = checkpoint.read_meta(folder)["stage1_sha256"]
    if trained_on != stage1_hash:
        raise BadInput(
            f"{folder}: was trained on Stage1 weights {trained_on[:12]}, stage1_checkpoint has {stage1_hash[:12]}"
        )
    checkpoint.load_into(two_stage.connector, checkpoint.read(folder, "model/connector"), str(folder))
    return two_stage.eval()


@torch.no_grad()
def estimate_statistics(two_stage: TwoStage, walk: SplitWalk, latents: LatentCache | None = None) -> None:
    """Give the connector the per-channel mean and std of Stage1's latents over the split, in one pass on all ranks.

    A latent cache has them already: the same numbers, but for its rounding.

    The latents are those that training sees, with the posterior's noise: the std of the means alone is too small by the
    noise's share (0.12 against 1.0 in a channel that the KL loss had all but switched off).
    """
    if not two_stage.connector.needs_statistics():
        return
    if latents is not None:
        two_stage.connector.set_statistics(*latents.statistics())
        return
    statistics, backend = ChannelStatistics(), walk.backend
    log.info("estimating the latents' mean and std over %d images", len(walk.stream))
    for batch, valid in walk.batches():
        statistics.update(two_stage.stage1.encode(batch).zs, valid)
    _, mean_c, std_c = statistics.reduced(backend.all_reduce)
    two_stage.connector.set_statistics(mean_c, std_c)


def seeded_noise(two_stage: TwoStage, seed: int, count: int) -> torch.Tensor:
    """(count, C, h, w) noise on the host; picture i's numbers depend on (seed, i) alone."""
    shape = tuple(two_stage.latent_shape)
    return torch.stack([normal(shape, generator=generator(seed, "pictures", i)) for i in range(count)])


@torch.no_grad()
def sample_grid(
    two_stage: TwoStage, walk: SplitWalk, spec: DataSpec, settings: SampleSettings, seed: int
) -> np.ndarray:
    """(H, W, 3) uint8: samples under conditions of the split, beside the true frames where the data continue frames.

    Conditions and noise are the same every time.
    """
    noise = seeded_noise(two_stage, seed, settings.images).to(walk.backend.device, walk.dtype)
    if continues_frames(spec):
        return window_grid(two_stage, walk, noise, settings.vis_sampler)
    batch = walk.first(settings.images)
    pictures = two_stage.decode(two_stage.sample(batch.condition, noise[: len(batch)], settings.vis_sampler))
    return image_grid(as_pictures(pictures), columns=max(1, round(len(pictures) ** 0.5)))
