"""Stage1 without a network for masks in colours: the class of each pixel, one-hot, is the latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.mask_colours import palette
from rqvae.models.interfaces import DataSpec, LabeledImageData, Stage1Encodings, Stage1ModelOutput
from rqvae.models.stage1.patches import PatchStage1


class PaletteStage1(PatchStage1):
    """Classes as "analog bits" (Chen et al. 2022): 1 for the class of a pixel, -1 for others; the largest is decoded.

    So whatever a generator makes decodes to a mask, in exactly the colours of `rqvae.mask_colours`. There is no
    parameter. Every patch x patch square is one position of K patch^2 channels, as in `PixelStage1`.

    Args:
        num_classes: K, that of the masks. A colour that is none of these classes' becomes the nearest one, so a run
            whose data have other classes is refused before it starts.
        patch: side of the squares.

    Raises:
        BadInput: a number out of its range.
    """

    colours: Tensor

    def __init__(self, num_classes: int, patch: int = 1) -> None:
        super().__init__(patch)
        if not 1 <= num_classes <= 255:
            raise BadInput(f"PaletteStage1.num_classes: expected 1 to 255, got {num_classes}")
        self.num_classes = num_classes
        colours = torch.from_numpy(palette(num_classes)[:num_classes]).float() / 255
        self.register_buffer("colours", colours, persistent=False)

    def numbers_per_pixel(self, channels: int) -> int:  # noqa: ARG002
        """One for each class."""
        return self.num_classes

    def check_data(self, spec: DataSpec) -> None:
        """Refuse images that are not masks in the colours of `num_classes` classes.

        Raises:
            BadInput: says which number the data have.
        """
        if spec.mask_colours != self.num_classes:
            have = f"masks of {spec.mask_colours}" if spec.mask_colours else "no masks in colours"
            raise BadInput(
                f"stage1.num_classes: expected that of the dataset's masks (MaskPictures), got {self.num_classes}; "
                f"the dataset has {have}"
            )

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
