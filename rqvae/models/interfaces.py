"""The three parts of a two-stage model and what passes between them.

image -> Stage1.encode -> Stage1Encodings -> connector.forward -> Stage2 -> connector.reverse -> Stage1.decode -> image
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rqvae.img_datasets.interfaces import (
    ActionCondition,
    ClassCondition,
    Condition,
    DataSpec,
    ImageShape,
    LabeledImageData,
    LatentShape,
    MaskCondition,
    Stage1Encodings,
    TensorFields,
    register_pytree,
)
from rqvae.models.blocks import listed_blocks
from rqvae.randomness import Draw

if TYPE_CHECKING:
    from rqvae.models.codec import Codec

__all__ = [
    "ActionCondition",
    "ClassCondition",
    "Condition",
    "DataSpec",
    "ImageShape",
    "LabeledImageData",
    "LatentShape",
    "MaskCondition",
    "Stage1Encodings",
    "Stage1Losses",
    "Stage1Model",
    "Stage1ModelOutput",
    "Stage2Losses",
    "Stage2Model",
    "Stage2ModelOutput",
    "base_connector",
]


@register_pytree
@dataclass
class Stage1ModelOutput(TensorFields):
    """A reconstruction.

    Args:
        xs_recon: (B, 3, H, W), in the units of images: [0, 1], not clamped.
        additional_attr: what `compute_loss` needs besides, for example `mu` and `logvar`.
    """

    xs_recon: Tensor
    additional_attr: dict[str, Any] | None = None


class _LossMapping(Mapping[str, Tensor]):
    """Losses that can be read as `losses.loss_recon` and as `losses["loss_recon"]`."""

    _keys: tuple[str, ...]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@register_pytree
@dataclass(eq=False)
class Stage1Losses(_LossMapping):
    """Losses of an autoencoder, scalars.

    Args:
        loss_recon: reconstruction loss, for example L1.
        loss_latent: loss of the latent, already weighted, for example KL.
    """

    loss_recon: Tensor
    loss_latent: Tensor
    _keys = ("loss_total", "loss_recon", "loss_latent")

    @property
    def loss_total(self) -> Tensor:
        """The sum of both."""
        return self.loss_recon + self.loss_latent


@register_pytree
@dataclass
class Stage2ModelOutput(TensorFields):
    """A prediction in training, a generated latent in sampling.

    Args:
        zs_pred: (B, C, h, w).
        zs_degraded: (B, C, h, w) the noised latent that went in, where there is one.
        additional_attr: for example `t`, `target`, or `nfe` (number of function evaluations) of a sample.
    """

    zs_pred: Tensor
    zs_degraded: Tensor | None = None
    additional_attr: dict[str, Any] | None = None

    @property
    def nfe(self) -> int | None:
        """Number of function evaluations of a sample; None where the model does not say."""
        return (self.additional_attr or {}).get("nfe")


@register_pytree
@dataclass(eq=False)
class Stage2Losses(_LossMapping):
    """Loss of a generator.

    Args:
        loss_total: scalar.
        per_sample: (B,) loss of each sample, for stratified statistics; None where there is none.
    """

    loss_total: Tensor
    per_sample: Tensor | None = None
    _keys = ("loss_total",)


class Stage1Model(nn.Module):
    """An autoencoder: image -> latent -> image. Images are in [0, 1] outside; the model normalises inside.

    `pretrained` says that the constructor loads the weights, so that no checkpoint is needed.
    """

    pretrained: bool = False

    def forward(self, inputs: LabeledImageData) -> Stage1ModelOutput:
        """Reconstruct (B, 3, H, W)."""
        raise NotImplementedError

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W). Deterministic where `inputs.draws` has no numbers for the model."""
        raise NotImplementedError

    def with_draws(self, encodings: Stage1Encodings, draws: Mapping[str, Tensor] | None) -> Stage1Encodings:  # noqa: ARG002
        """What `encode` gives with these draws, from what it gives without any, and without the image.

        The door of cached latents: a posterior is sampled anew from its cached moments. A model that uses no draws in
        `encode` has nothing to do.
        """
        return encodings

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        """Decode a latent."""
        raise NotImplementedError

    def compute_loss(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Stage1Losses:
        """Losses of a reconstruction. Touches no parameter: DDP and FSDP hooks run in `forward`."""
        raise NotImplementedError

    def latent_shape(self, image_shape: ImageShape) -> LatentShape:
        """The latent's shape, without batch, of an image (3, H, W).

        Raises:
            BadInput: a side that the model's factor does not divide.
        """
        raise NotImplementedError

    def check_data(self, spec: DataSpec) -> None:
        """Raise BadInput where images of these data cannot be encoded as they are; most models take any."""

    def latent_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and std (C,) float64 of the latents, where the weights come with them; None where they are unknown."""
        return None

    def get_recon_imgs(self, images: Tensor) -> Tensor:
        """Images as they are shown and scored: clamped to [0, 1]."""
        return images.clamp(0, 1)

    def get_last_layer(self) -> nn.Parameter:
        """The last layer's weight, for the adaptive GAN weight of Esser et al. 2021 (taming transformers), eq. 7."""
        raise NotImplementedError(f"{type(self).__name__} has no last layer: use gan.weighting reconstruction or fixed")

    def draws(self, image_shape: ImageShape) -> dict[str, Draw]:  # noqa: ARG002
        """The random numbers a training forward needs per sample."""
        return {}

    def repeated_blocks(self) -> list[nn.Module]:
        """What `train.compile` and `train.activation_checkpointing` work on, each called as `block(...)`."""
        return listed_blocks(self)


class base_connector(nn.Module):  # noqa: N801  (the name its users know)
    """The identity between Stage1's latent and Stage2's; also turns a `Stage2ModelOutput` into `Stage1Encodings`."""

    def forward(self, encodings: Stage1Encodings) -> Stage1Encodings:
        """From Stage1's latent to what Stage2 models."""
        return encodings

    def reverse(self, encodings: Stage1Encodings | Stage2ModelOutput) -> Stage1Encodings:
        """From Stage2's latent back to Stage1's."""
        if isinstance(encodings, Stage2ModelOutput):
            return Stage1Encodings(zs=encodings.zs_pred, additional_attr=encodings.additional_attr)
        return encodings

    def latent_shape(self, stage1_shape: LatentShape) -> LatentShape:
        """Shape after `forward` of a latent of `stage1_shape`."""
        return stage1_shape

    def needs_statistics(self) -> bool:
        """Whether `set_statistics` must be called before use."""
        return False

    def set_statistics(self, mean_c: Tensor, std_c: Tensor) -> None:
        """Take the per-channel mean and std (C,) of Stage1's latents over the train split."""
        raise NotImplementedError(f"{type(self).__name__} takes no statistics")

    def use_latent_scale(self, mean_c: Tensor, std_c: Tensor) -> None:
        """Take the scale that Stage1 comes with (`Stage1Model.latent_statistics`), before the first use.

        A connector that does not scale has no use for it.
        """


class Stage2Model(nn.Module):
    """A generator of latents. Built from shapes: `stage2 = config.stage2(latent_shape, data_spec)`.

    `in_pixels` says that what it noises and generates are pixels (3, H, W) in [-1, 1], and its latents are its own
    affair: it then encodes and decodes with what `attach` gives it. `needs_images` says that its loss reads the images
    too, which a cache of latents has not.
    """

    in_pixels: bool = False
    needs_images: bool = False

    def attach(self, codec: Codec) -> None:
        """Take the frozen autoencoder, for a model that works through it; called once, by `TwoStage`.

        It must not become a submodule. A model that knows latents alone has no use for it.
        """

    def forward(self, encodings: Stage1Encodings, inputs: LabeledImageData) -> Stage2ModelOutput:
        """One training prediction from the clean latent; uses `inputs.draws`."""
        raise NotImplementedError

    def compute_loss(
        self, encodings: Stage1Encodings, output: Stage2ModelOutput, inputs: LabeledImageData
    ) -> Stage2Losses:
        """Loss of a prediction. Touches no parameter."""
        raise NotImplementedError

    def infer(self, inputs: LabeledImageData, *, noise: Tensor, sampler: Any = None) -> Stage2ModelOutput:
        """Generate from `noise` (B, C, h, w) under `inputs.condition`; `sampler` overrides the model's own."""
        raise NotImplementedError

    def draws(self, latent_shape: LatentShape) -> dict[str, Draw]:  # noqa: ARG002
        """The random numbers a training forward needs per sample."""
        return {}

    def repeated_blocks(self) -> list[nn.Module]:
        """What `train.compile` and `train.activation_checkpointing` work on, each called as `block(...)`."""
        return listed_blocks(self)
