"""Stage1 without a network: pixels, or patches of pixels, are the latent."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)

from rqvae.models.interfaces import LabeledImageData, Stage1Encodings, Stage1ModelOutput
from rqvae.models.stage1.patches import PatchStage1


class PixelStage1(PatchStage1):
    """Pixels in [-1, 1] as the latent; every patch x patch square of them becomes one position of 3 * patch^2 channels.

    Channel `(c * patch + i) * patch + j` of position (y, x) is colour c of the pixel (y * patch + i, x * patch + j)
    (`torch.nn.functional.pixel_unshuffle`). There is no parameter.

    Decoding an encoding gives the image again. In float32 the only rounding is that of 2x - 1 where x < 1/4, at most
    2^-25 there, so 2^-26 (1.5e-8) in the image: everything else is exact (Sterbenz' lemma), images that are k / 255
    come back to the same k, and values of at least 1/4 come back to the bit.

    Args:
        patch: side of the squares; 1 keeps the image's shape.

    Raises:
        BadInput: `patch` below 1.
    """

    def __init__(self, patch: int = 1) -> None:
        super().__init__(patch)

    def numbers_per_pixel(self, channels: int) -> int:
        """As many as it has."""
        return channels

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        """Encode (B, 3, H, W) in [0, 1] to zs (B, 3 p^2, H/p, W/p) in [-1, 1].

        Raises:
            BadInput: a side that the patch does not divide.
        """
        images_bchw = inputs.require_img()
        _, channels, height, width = images_bchw.shape
        self.latent_shape((channels, height, width))
        return Stage1Encodings(zs=F.pixel_unshuffle(2 * images_bchw - 1, self.patch))

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        """Decode zs (B, 3 p^2, h, w) to xs_recon (B, 3, h p, w p)."""
        return Stage1ModelOutput(xs_recon=(F.pixel_shuffle(encodings.zs, self.patch) + 1) / 2)
