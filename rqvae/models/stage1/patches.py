"""What autoencoders without a network have in common: squares of pixels as positions, and a loss that is rounding."""

from __future__ import annotations

from rqvae.errors import BadInput
from rqvae.models.interfaces import (
    ImageShape,
    LabeledImageData,
    LatentShape,
    Stage1Losses,
    Stage1Model,
    Stage1ModelOutput,
)
from rqvae.models.losses.recon import recon_loss


class PatchStage1(Stage1Model):
    """Every patch x patch square of pixels is one position of the latent; there is no parameter.

    A subclass says how many numbers a pixel has in the latent, encodes and decodes.

    Args:
        patch: side of the squares; 1 keeps the image's shape.

    Raises:
        BadInput: `patch` below 1.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        if patch < 1:
            raise BadInput(f"{type(self).__name__}.patch: expected at least 1, got {patch}")
        self.patch = patch

    def numbers_per_pixel(self, channels: int) -> int:
        """Of the latent, for a pixel of an image with `channels` channels."""
        raise NotImplementedError

    def forward(self, inputs: LabeledImageData) -> Stage1ModelOutput:
        """Reconstruct (B, 3, H, W)."""
        return self.decode(self.encode(inputs))

    def compute_loss(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Stage1Losses:
        """L1 in image units, which is rounding alone; the latent costs nothing."""
        images_bchw = inputs.require_img()
        recon = recon_loss("l1", output.xs_recon, images_bchw)
        return Stage1Losses(loss_recon=recon, loss_latent=images_bchw.new_zeros(()))

    def latent_shape(self, image_shape: ImageShape) -> LatentShape:
        """(numbers of a pixel * p^2, H/p, W/p) of an image (3, H, W).

        Raises:
            BadInput: a side that the patch does not divide.
        """
        channels, height, width = image_shape
        if height % self.patch or width % self.patch:
            name = type(self).__name__
            raise BadInput(f"image size {height}x{width} is not divisible by the patch {self.patch} of {name}")
        return self.numbers_per_pixel(channels) * self.patch**2, height // self.patch, width // self.patch
