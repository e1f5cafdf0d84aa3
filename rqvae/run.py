"""The typed schema of an experiment: every key of a config is a field here, or an argument of the class it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from rqvae.callbacks.channels.settings import InterventionSettings, TrackingSettings
from rqvae.callbacks.interfaces import Intervention, Observer
from rqvae.durations import Duration, DurationText
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageDataset, LatentShape, Split, Transform
from rqvae.img_datasets.transforms import TestTransform, TrainTransform, ValTransform
from rqvae.models.interfaces import Stage1Model, Stage2Model, base_connector
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.trainers.settings import (
    CheckpointSettings,
    EmaSettings,
    LogSettings,
    OnlineEvalSettings,
    PictureSettings,
    SampleSettings,
    TrainSettings,
)
from rqvae.trainers.updates import UpdateSettings

MakeTransform = Callable[[DataSpec], Transform]


@dataclass(frozen=True)
class DataSettings:
    """The images.

    Args:
        dataset: class of the dataset; it is made once a split, with the split as first argument.
        batch_size: images of one optimizer step, over all ranks and micro-batches.
        train_transform: class of the train split's transform; it is made with the dataset's `DataSpec`.
        val_transform: the same of the validation split.
        test_transform: the same of the test split; never an augmentation.
        workers: loader processes of each rank.
        latents: folder of a latent cache (`python -m rqvae cache-latents`), from which Stage2 is trained in place of
            the train split's images; null encodes the images.
    """

    dataset: Callable[[Split], LabeledImageDataset]
    batch_size: int = 32
    train_transform: MakeTransform = TrainTransform
    val_transform: MakeTransform = ValTransform
    test_transform: MakeTransform = TestTransform
    workers: int = 4
    latents: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise BadInput(f"data: expected batch_size >= 1 and workers >= 0, got {self.batch_size}, {self.workers}")

    @property
    def cache(self) -> str | None:
        """Folder of the latent cache, which `latents` or the dataset's own key `vae` names.

        Raises:
            BadInput: both do.
        """
        named = self.dataset("train").vae
        if named and self.latents:
            raise BadInput(f"data.latents: expected null, as data.dataset vae names {named}, got {self.latents}")
        return self.latents or named

    def make(self, split: Split) -> tuple[LabeledImageDataset, Transform]:
        """The dataset of a split, not opened yet, and its transform."""
        dataset = self.dataset(split)
        make_transform = {"train": self.train_transform, "val": self.val_transform, "test": self.test_transform}[split]
        return dataset, make_transform(dataset.spec)


@dataclass(frozen=True)
class LpipsSettings:
    """Perceptual loss (Zhang et al. 2018).

    Args:
        weight: of the loss in the autoencoder's total.
        net: vgg, the usual choice for a loss, or alex.
        trunk_weights: file or URL (its name ends in -SHA256.pth) of the network's weights; null is torchvision's URL.
    """

    weight: float = 1.0
    net: Literal["vgg", "alex"] = "vgg"
    trunk_weights: str | None = None


@dataclass(frozen=True)
class GanSettings:
    """Adversarial loss.

    Args:
        discriminator: the network that tells real images from reconstructions.
        loss: hinge (Lim & Ye 2017) or non_saturating (Goodfellow et al. 2014).
        weight: of the generator's loss in the autoencoder's total, before the adaptive factor.
        weighting: adaptive factor. last_layer: ratio of the gradients' norms at the last layer (Esser et al. 2021,
            eq. 7);
            reconstruction: the same ratio at the reconstructed image, needs no parameter; fixed: none.
        disc_start: the first step (counted from 1) in which the discriminator learns and is learnt from.
        reuse_forward: score the reconstructions of the autoencoder's own step, instead of a second forward.
    """

    discriminator: nn.Module
    loss: Literal["hinge", "non_saturating"] = "hinge"
    weight: float = 0.5
    weighting: Literal["last_layer", "reconstruction", "fixed"] = "last_layer"
    disc_start: DurationText = 0
    reuse_forward: bool = False

    def __post_init__(self) -> None:
        if str(self.disc_start).strip() != "0":
            try:
                Duration.parse(self.disc_start)
            except BadInput as error:
                raise BadInput(f"gan.disc_start: {error}") from None


@dataclass(frozen=True)
class Stage1Updates:
    """The optimizers of Stage1.

    Args:
        autoencoder: of the Stage1 model.
        discriminator: of the discriminator.
    """

    autoencoder: UpdateSettings = field(default_factory=UpdateSettings)
    discriminator: UpdateSettings = field(default_factory=UpdateSettings)


@dataclass(frozen=True)
class Stage2Updates:
    """The optimizers of Stage2.

    Args:
        generator: of the Stage2 model.
    """

    generator: UpdateSettings = field(default_factory=UpdateSettings)


@dataclass(frozen=True)
class Stage1Run:
    """An experiment that trains an autoencoder.

    Args:
        data: the images.
        stage1: the autoencoder.
        lpips: perceptual loss; null is without.
        gan: adversarial loss; null is without.
        losses: more terms of the autoencoder's total, by class_path.
        updates: optimizers.
        train: length, precision, seed.
        ema: running averages of the autoencoder.
        checkpoint: when checkpoints are written.
        logging: mirrors of the log.
        pictures: grids of reconstructions.
        online_eval: scores of reconstructions of the validation split while training.
        profile: START:STOP records these steps (0 is the first, STOP is not included) under RUN/profile/: trace,
            operators, memory (in a file in quotes: YAML reads 5:8 as a number); null does not.
        tracking: statistics and states of the autoencoder's channels.
        intervention: what is done to channels that die.
        observers: more observers, by class_path.
        interventions: by class_path.
    """

    data: DataSettings
    stage1: Stage1Model
    lpips: LpipsSettings | None = None
    gan: GanSettings | None = None
    losses: list[ImageLoss] = field(default_factory=list)
    updates: Stage1Updates = field(default_factory=Stage1Updates)
    train: TrainSettings = field(default_factory=TrainSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LogSettings = field(default_factory=LogSettings)
    pictures: PictureSettings = field(default_factory=PictureSettings)
    online_eval: OnlineEvalSettings = field(default_factory=OnlineEvalSettings)
    profile: str | None = None
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    intervention: InterventionSettings = field(default_factory=InterventionSettings)
    observers: list[Observer] = field(default_factory=list)
    interventions: list[Intervention] = field(default_factory=list)

    stage = 1

    def __post_init__(self) -> None:
        names = [loss.name for loss in self.losses]
        if len(set(names)) < len(names):
            raise BadInput(f"losses: expected different names, got {names}")


@dataclass(frozen=True)
class Stage2Run:
    """An experiment that trains a generator on the latents of a frozen autoencoder.

    Args:
        data: the images and conditions.
        stage1: the autoencoder, frozen.
        stage2: class of the generator; it is made with the latent's shape and the dataset's `DataSpec`.
        stage1_checkpoint: run or checkpoint folder of the autoencoder; null for one without parameters.
        connector: between the two latents; null is the identity.
        updates: optimizers.
        train: length, precision, seed.
        ema: running averages of the generator.
        checkpoint: when checkpoints are written.
        logging: mirrors of the log.
        pictures: grids of samples; of a world model also films.
        online_eval: scores of generated images while training; off until asked for.
        profile: START:STOP records these steps (0 is the first, STOP is not included) under RUN/profile/: trace,
            operators, memory (in a file in quotes: YAML reads 5:8 as a number); null does not.
        debug: write shapes, ranges, classes, times and predictions of every step to RUN/debug.jsonl and the console:
            for runs of a few steps.
        observers: more observers, by class_path.
        interventions: by class_path.
    """

    data: DataSettings
    stage1: Stage1Model
    stage2: Callable[[LatentShape, DataSpec], Stage2Model]
    stage1_checkpoint: str | None = None
    connector: base_connector | None = None
    updates: Stage2Updates = field(default_factory=Stage2Updates)
    train: TrainSettings = field(default_factory=TrainSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LogSettings = field(default_factory=LogSettings)
    pictures: SampleSettings = field(default_factory=SampleSettings)
    online_eval: OnlineEvalSettings = field(default_factory=lambda: OnlineEvalSettings(every=None, metrics=["gfid"]))
    profile: str | None = None
    debug: bool = False
    observers: list[Observer] = field(default_factory=list)
    interventions: list[Intervention] = field(default_factory=list)

    stage = 2


AnyRun = Stage1Run | Stage2Run
