"""The whole model: a frozen autoencoder, a connector, and a generator of its latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from rqvae.contracts import check_shape, check_type
from rqvae.errors import BadInput
from rqvae.models.codec import Codec
from rqvae.models.interfaces import (
    ActionCondition,
    Condition,
    ImageShape,
    LabeledImageData,
    LatentShape,
    Stage1Encodings,
    Stage1Model,
    Stage2Losses,
    Stage2Model,
    Stage2ModelOutput,
    base_connector,
)
from rqvae.models.stage1.pixel import PixelStage1

Stage2Forward = Callable[[Stage1Encodings, LabeledImageData], Stage2ModelOutput]


class TwoStage(nn.Module):
    """image -> Stage1.encode -> connector.forward -> Stage2 -> connector.reverse -> Stage1.decode -> image.

    Stage1 is frozen: always in eval mode, no gradients. Stage2 is built from `latent_shape` and registers neither of
    the other two, so its checkpoint, EMA and optimizer hold nothing of them.

    A Stage2 that is `in_pixels` noises and generates pixels in [-1, 1] and goes through the autoencoder itself
    (`attach`): `latent_shape` is then the image's, and the way above is that of `PixelStage1`.

    Args:
        stage1: the trained autoencoder; it is frozen in place.
        connector: between its latent and Stage2's.
        stage2: the generator.
        image_shape: (3, H, W) of the data.
    """

    def __init__(
        self, stage1: Stage1Model, connector: base_connector, stage2: Stage2Model, image_shape: ImageShape
    ) -> None:
        super().__init__()
        self.stage1 = stage1.requires_grad_(False).eval()
        self.connector, self.stage2 = connector, stage2
        self.image_shape: ImageShape = image_shape
        self.codec = Codec(self.stage1, connector)
        latent_shape = tuple(connector.latent_shape(stage1.latent_shape(image_shape)))
        self.latent_shape: LatentShape = image_shape if stage2.in_pixels else latent_shape
        self._space = Codec(PixelStage1(), base_connector()) if stage2.in_pixels else self.codec
        stage2.attach(self.codec)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but Stage1, which stays in eval mode."""
        super().train(mode)
        self.stage1.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch: LabeledImageData) -> LabeledImageData:
        """A batch as the dataset gives it -> the batch as Stage2 takes it. Call it once a batch.

        Args:
            batch: `img` (B, 3, H, W), or Stage1's latents in `encodings`, which spare the encoder but neither the
                posterior's noise nor the connector. Frames (B, K, 3, H, W) in `condition.context` are encoded, cached
                latents there only go through the connector, and Stage2's own stay.

        Returns:
            The batch with Stage2's latents in `encodings`.

        Raises:
            BadInput: neither frames nor latents in the context.
        """
        stage1, connector = self._space.stage1, self._space.connector
        if batch.encodings is None:
            encodings = stage1.encode(batch)
        else:
            encodings = stage1.with_draws(batch.encodings, batch.draws)
        check_type(encodings, Stage1Encodings, "stage1: encode")
        latents = connector(encodings)
        check_type(latents, Stage1Encodings, "connector: forward")
        check_shape(latents.zs, (len(encodings.zs), *self.latent_shape), "connector: forward: zs")
        return replace(batch, encodings=latents, condition=self._with_encoded_context(batch.condition))

    def training_loss(
        self, batch: LabeledImageData, stage2: Stage2Forward | None = None
    ) -> tuple[Stage2Losses, Stage2ModelOutput]:
        """Loss of one batch as the dataset gives it.

        Args:
            batch: see `prepare`, and `draws` as Stage2 asks for them.
            stage2: Stage2 as its parallel or compiled wrapper, whose forward is called exactly once; None is the
                bare one.

        Returns:
            The losses, and the prediction they are of.
        """
        batch = self.prepare(batch)
        encodings = batch.encodings
        assert encodings is not None, "prepare gives encodings"
        output = (self.stage2 if stage2 is None else stage2)(encodings, batch)
        check_type(output, Stage2ModelOutput, "stage2: forward")
        losses = self.stage2.compute_loss(encodings, output, batch)
        check_type(losses, Stage2Losses, "stage2: compute_loss")
        check_shape(losses.loss_total, (), "stage2: compute_loss: loss_total")
        return losses, output

    @torch.no_grad()
    def sample(self, condition: Condition | None, noise: Tensor, sampler: Any = None) -> Stage2ModelOutput:
        """Generate latents, with Stage2 in eval mode (no dropout) whatever its mode is.

        Args:
            condition: of length B as the dataset gives it; None for a model without conditions.
            noise: (B, *latent_shape).
            sampler: in place of Stage2's own.

        Returns:
            Stage2's output with zs_pred (B, *latent_shape), for `decode`.

        Raises:
            BadInput: noise of another shape, or a condition of another length.
        """
        if noise.shape[1:] != self.latent_shape:
            raise BadInput(f"noise: expected (B, {str(self.latent_shape)[1:]}, got {tuple(noise.shape)}")
        if condition is not None and len(condition) != len(noise):
            raise BadInput(f"condition: expected {len(noise)} samples as in noise, got {len(condition)}")
        inputs = LabeledImageData(condition=self._with_encoded_context(condition))
        was_training = self.stage2.training
        self.stage2.eval()
        try:
            output = self.stage2.infer(inputs, noise=noise, sampler=sampler)
        finally:
            self.stage2.train(was_training)
        check_type(output, Stage2ModelOutput, "stage2: infer")
        check_shape(output.zs_pred, tuple(noise.shape), "stage2: infer: zs_pred")
        return output

    @torch.no_grad()
    def decode(self, output: Stage1Encodings | Stage2ModelOutput) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of Stage2's latents."""
        stage1, connector = self._space.stage1, self._space.connector
        return self.stage1.get_recon_imgs(stage1.decode(connector.reverse(output)).xs_recon)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Stage2's latents (B, *latent_shape) of images (B, 3, H, W) in [0, 1], without posterior noise."""
        return self._space.encode(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] through encoder, connector and back: what no sample can be better than."""
        return self.stage1.get_recon_imgs(self.codec.decode(self.codec.encode(images)))

    def _with_encoded_context(self, condition: Condition | None) -> Condition | None:
        """History frames (B, K, 3, H, W), or cached latents of them, as Stage2's latents (B, K, *latent_shape)."""
        if not isinstance(condition, ActionCondition) or condition.context is None or condition.encoded:
            return condition
        frames, shape = condition.context, tuple(condition.context.shape[2:])
        if condition.cached:
            encoded = self.connector(Stage1Encodings(frames.flatten(0, 1))).zs.unflatten(0, frames.shape[:2])
            return replace(condition, context=encoded, encoded=True, cached=False)
        if shape == tuple(self.image_shape):
            encoded = self._space.encode(frames.flatten(0, 1))
            return replace(condition, context=encoded.unflatten(0, frames.shape[:2]), encoded=True)
        raise BadInput(
            f"condition.context: expected frames (B, K, {str(tuple(self.image_shape))[1:]}, or latents marked as "
            f"encoded, got {tuple(frames.shape)}"
        )
