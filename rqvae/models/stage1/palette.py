"""Stage1 without a network for masks in colours: the class of each pixel, one-hot, is the latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.mask_colours import palette
from rqvae.models.interfaces import (
    ImageShape,
    LabeledImageData,
    LatentShape,
    Stage1Encodings,
    Stage1Losses,
    Stage1Model,
    Stage1ModelOutput,
)
from rqvae.models.losses.recon import recon_loss


class PaletteStage1(Stage1Model):
    """Classes as "analog bits" (Chen et al. 2022): 1 for the class of a pixel, -1 for others; the largest is decoded.

    So whatever a generator makes decodes to a mask, in exactly the colours of `rqvae.mask_colours`. There is no
    parameter. Every patch x patch square is one position of K patch^2 channels, as in `PixelStage1`.

    Args:
        num_classes: K, that of the masks: a colour that is none of these classes' becomes the nearest one, unsaid.
        patch: side of the squares.

    Raises:
        BadInput: a number out of its range.
    """

    colours: Tensor

    def __init__(self, num_classes: int, patch: int = 1) -> None:
        super().__init__()
        if patch < 1 or not 1 <= num_classes <= 255:
            raise BadInput(
                f"PaletteStage1: expected patch >= 1 and num_classes in 1 to 255, got {patch} and {num_classes}"
            )
        self.num_classes, self.patch = num_classes, patch
        colours = torch.from_numpy(palette(num_classes)[:num_classes]).float() / 255
        self.register_buffer("colours", colours, persistent=False)

    def forward(self, inputs: LabeledImageData) -> Stage1ModelOutput:
        """Reconstruct (B, 3, H, W): the image itself where its colours are those of classes, else the nearest ones."""
        return self.decode(self.encode(inputs))

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W) in [0, 1] to zs (B, K p^2, H/p, W/p) of -1 and 1.

        Raises:
            BadInput: a side that the patch does not divide.
        """
        images_bchw = inputs.require_img()
        _, channels, height, width = images_bchw.shape
        self.latent_shape((channels, height, width))
        distance_bkhw = (images_bchw[:, None] - self.colours[:, :, None, None].to(images_bchw)).square().sum(2)
        one_hot = F.one_hot(distance_bkhw.argmin(1), self.num_classes).movedim(-1, 1).to(images_bchw)
        return Stage1Encodings(zs=F.pixel_unshuffle(2 * one_hot - 1, self.patch))

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        """Decode zs (B, K p^2, h, w) to xs_recon (B, 3, h p, w p), each pixel in the colour of a class."""
        mask_bhw = F.pixel_shuffle(encodings.zs, self.patch).argmax(1)
        return Stage1ModelOutput(xs_recon=self.colours.to(encodings.zs)[mask_bhw].movedim(-1, 1))

    def compute_loss(self, output: Stage1ModelOutput, inputs: LabeledImageData) -> Stage1Losses:
        """L1 in image units, 0 for masks; the latent costs nothing."""
        images_bchw = inputs.require_img()
        recon = recon_loss("l1", output.xs_recon, images_bchw)
        return Stage1Losses(loss_recon=recon, loss_latent=images_bchw.new_zeros(()))

    def latent_shape(self, image_shape: ImageShape) -> LatentShape:
        """(K p^2, H/p, W/p) of an image (3, H, W).

        Raises:
            BadInput: a side that the patch does not divide.
        """
        _, height, width = image_shape
        if height % self.patch or width % self.patch:
            raise BadInput(f"image size {height}x{width} is not divisible by the patch {self.patch} of PaletteStage1")
        return self.num_classes * self.patch**2, height // self.patch, width // self.patch
