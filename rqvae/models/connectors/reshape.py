"""A sequence of latent tokens seen as an image, for Stage2 models that work on a grid."""

from __future__ import annotations

from dataclasses import replace

from rqvae.errors import BadInput
from rqvae.models.interfaces import LatentShape, Stage1Encodings, Stage2ModelOutput, base_connector


class ReshapeConnector(base_connector):
    """(B, L, C) tokens in row-major order <-> (B, C, height, width), with L = height width. No copy is made.

    Args:
        height: rows of the grid.
        width: columns of the grid.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        if height < 1 or width < 1:
            raise BadInput(f"connector: expected height and width >= 1, got {height} and {width}")
        self.height, self.width = height, width

    def forward(self, encodings: Stage1Encodings) -> Stage1Encodings:
        """(B, L, C) -> (B, C, height, width).

        Raises:
            BadInput: not three axes, or L is not height x width.
        """
        self.latent_shape(tuple(encodings.zs.shape[1:]))
        return replace(encodings, zs=encodings.zs.transpose(1, 2).unflatten(2, (self.height, self.width)))

    def reverse(self, encodings: Stage1Encodings | Stage2ModelOutput) -> Stage1Encodings:
        """(B, C, height, width) -> (B, L, C).

        Raises:
            BadInput: another height or width.
        """
        latents = super().reverse(encodings)
        if latents.zs.shape[2:] != (self.height, self.width):
            raise BadInput(
                f"connector: expected a latent (B, C, {self.height}, {self.width}), got {tuple(latents.zs.shape)}"
            )
        return replace(latents, zs=latents.zs.flatten(2).transpose(1, 2))

    def latent_shape(self, stage1_shape: LatentShape) -> LatentShape:
        """(L, C) -> (C, height, width).

        Raises:
            BadInput: not two axes, or L is not height x width.
        """
        if len(stage1_shape) != 2 or stage1_shape[0] != self.height * self.width:
            raise BadInput(
                f"connector: expected tokens (L, C) with L = {self.height} x {self.width} = "
                f"{self.height * self.width}, got {tuple(stage1_shape)}"
            )
        return (stage1_shape[1], self.height, self.width)
