"""Between images and Stage2's latents, for a Stage2 that works through the autoencoder itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rqvae.errors import BadInput
from rqvae.models.interfaces import LabeledImageData, Stage1Encodings, Stage1Model, base_connector


@dataclass(frozen=True)
class Codec:
    """A frozen Stage1 and the connector behind it.

    No module, so that whoever holds it does not register Stage1: a state dict or an average with a copy of the
    autoencoder in it would overwrite the autoencoder that the run names when it is loaded.

    Args:
        stage1: in eval mode, its parameters without gradients.
        connector: behind it.
    """

    stage1: Stage1Model
    connector: base_connector

    def encode(self, images_bchw: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w), without posterior noise; gradients flow through.

        Raises:
            BadInput: a Stage1 whose `encode` cuts the gradient off: what comes before it would never learn.
        """
        zs = self.connector(self.stage1.encode(LabeledImageData(img=images_bchw))).zs
        if images_bchw.requires_grad and not zs.requires_grad:
            name = type(self.stage1).__name__
            raise BadInput(f"stage1: {name}.encode: expected gradients to flow through to the images, got a constant")
        return zs

    def decode(self, zs_bchw: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in units of [0, 1], not clamped; gradients flow through."""
        return self.stage1.decode(self.connector.reverse(Stage1Encodings(zs_bchw))).xs_recon
