"""DiT, the diffusion transformer (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023).

A backbone: from a latent, a time and a condition to a latent. What its answer means (velocity, noise, data) is decided
by who trains it.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LatentShape
from rqvae.models.layers.embeddings import TimestepEmbedding, condition_embedding, sincos_2d
from rqvae.models.layers.mask_embedding import MaskLayout
from rqvae.models.layers.transformer import AdaLNZeroBlock, linear, modulated_norm

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads: Peebles & Xie 2023, table 1."""


class DiT(nn.Module):
    """The adaLN-Zero DiT, conditioned on time and on a class, on actions or on a mask.

    Its first answer is exactly zero: the final layer and all modulations begin at zero. Frames of history
    (`ActionCondition.context`) are not read. Of a mask the shares of the classes at each latent position are embedded
    patch by patch and added to the tokens; their shares of the whole mask steer the modulations.

    Args:
        latent_shape: (C, h, w) of what comes in and goes out; given by Stage1 and the connector.
        data_spec: what the conditions are; given by the dataset.
        size: S, B, L or XL of the paper's table 1; gives depth, width and heads where they are not given.
        depth: number of blocks.
        width: of the tokens; a multiple of 4 and of heads.
        heads: of the attention.
        patch: side of the square of latent pixels that is one token.
        mlp_ratio: hidden width of the MLPs over `width`.
        dropout: after attention and MLP of each block; 0 in the paper.

    Raises:
        BadInput: a latent that is not (C, h, w) or that the patch does not divide; neither size nor depth, width and
            heads; a width that does not fit; conditions that it cannot embed.
    """

    position_nd: Tensor

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        size: Literal["S", "B", "L", "XL"] | None = None,
        depth: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        patch: Literal[1, 2, 4, 8] = 2,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, self.rows, self.columns = _grid(latent_shape, patch)
        depth, width, heads = _dimensions(size, depth=depth, width=width, heads=heads)
        self.latent_shape, self.patch = tuple(latent_shape), patch
        self.embed = linear(channels * patch**2, width)
        self.register_buffer("position_nd", sincos_2d(width, self.rows, self.columns), persistent=False)
        self.time = TimestepEmbedding(width)
        self.layout, self.embed_layout = None, None
        if data_spec.num_mask_classes:
            self.layout = MaskLayout(data_spec, self.latent_shape)
            self.embed_layout = linear(self.layout.channels * patch**2, width)
        self.condition = condition_embedding(data_spec, width, masks=True)
        self.blocks = nn.ModuleList(AdaLNZeroBlock(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.final_modulation = linear(width, 2 * width, zero=True)
        self.final = linear(width, patch**2 * channels, zero=True)

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """One answer.

        Args:
            x_bchw: (B, C, h, w).
            t_b: (B,) in [0, 1].
            condition: of length B; None exactly where the data have none.

        Returns:
            (B, C, h, w).

        Raises:
            BadInput: another latent shape, or another kind of condition than the data's.
        """
        if x_bchw.shape[1:] != self.latent_shape:
            raise BadInput(f"latent: expected (B, {str(self.latent_shape)[1:]}, got {tuple(x_bchw.shape)}")
        active_bd = F.silu(self._conditioning(t_b, condition))
        x_bnd = self.embed(self._patches(x_bchw)) + self.position_nd
        if self.layout is not None and self.embed_layout is not None:
            x_bnd = x_bnd + self.embed_layout(self._patches(self.layout(condition, x_bchw)))
        for block in self.blocks:
            x_bnd = block(x_bnd, active_bd)
        shift, scale = self.final_modulation(active_bd).unsqueeze(1).chunk(2, dim=-1)
        return self._image(self.final(modulated_norm(x_bnd, shift, scale)))

    def _conditioning(self, t_b: Tensor, condition: Condition | None) -> Tensor:
        """(B, width)."""
        if self.condition is not None:
            return self.time(t_b) + self.condition(condition)
        if condition is not None:
            raise BadInput(f"condition: expected None (the data have none), got {type(condition).__name__}")
        return self.time(t_b)

    def _patches(self, x_bchw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, C p p), in the order of a convolution's weight."""
        p = self.patch
        return x_bchw.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _image(self, x_bnd: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, h, w); the channel varies fastest, as in the paper's code."""
        p = self.patch
        grid = x_bnd.unflatten(2, (p, p, -1)).unflatten(1, (self.rows, self.columns))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _grid(latent_shape: LatentShape, patch: int) -> tuple[int, int, int]:
    """Channels, and the rows and columns of tokens."""
    if patch not in (1, 2, 4, 8):
        raise BadInput(f"stage2.patch: expected 1, 2, 4 or 8, got {patch}")
    if len(latent_shape) != 3:
        raise BadInput(f"stage2: expected a latent (C, h, w), got {tuple(latent_shape)}")
    channels, height, width = latent_shape
    if height % patch or width % patch:
        raise BadInput(f"stage2.patch: expected latent sides divisible by {patch}, got {height} x {width}")
    return channels, height // patch, width // patch


def _dimensions(size: str | None, **given: int | None) -> tuple[int, int, int]:
    """Depth, width and heads: what is given, else the size's."""
    if size is not None and size not in SIZES:
        raise BadInput(f"stage2.size: expected one of {', '.join(SIZES)}, got {size}")
    numbers = dict(zip(given, SIZES[size], strict=True)) if size is not None else {}
    numbers |= {name: value for name, value in given.items() if value is not None}
    for name in given:
        if numbers.get(name, 0) < 1:
            raise BadInput(f"stage2.{name}: expected a number >= 1, or a size, got {numbers.get(name)}")
    return numbers["depth"], numbers["width"], numbers["heads"]
