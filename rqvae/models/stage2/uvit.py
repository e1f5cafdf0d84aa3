"""U-ViT of simple diffusion (Hoogeboom, Heek, Salimans, "simple diffusion: End-to-end diffusion for high resolution
images", 2023, section 3): convolutions at high resolution, a transformer with most of the parameters at the lowest.

A backbone: from a latent, a time and a condition to a latent. What its answer means (velocity, noise, data) is decided
by who trains it. It is not the U-ViT of Bao et al. 2022, a transformer with long skip connections.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rqvae.img_datasets.interfaces import Condition, DataSpec, LatentShape
from rqvae.models.layers.embeddings import sincos_2d
from rqvae.models.layers.film import TimeAndCondition
from rqvae.models.layers.transformer import AdaLNZeroBlock, linear
from rqvae.models.layers.ushape import Blocks, Level, UShape, check_latent, check_sizes, lowest_sides


class TransformerMiddle(nn.Module):
    """A transformer over the positions of a feature map: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        rows: H.
        columns: W.
        width: of the tokens and of the steering vector; a multiple of 4 and of heads.
        depth: number of blocks.
        heads: of the attention.
        mlp_ratio: hidden width of the MLPs over `width`.
        dropout: after attention and MLP of each block.

    Raises:
        BadInput: a width that 4 or `heads` does not divide.
    """

    position_nd: Tensor

    def __init__(
        self,
        channels: int,
        rows: int,
        columns: int,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed = linear(channels, width)
        self.register_buffer("position_nd", sincos_2d(width, rows, columns), persistent=False)
        self.blocks = nn.ModuleList(AdaLNZeroBlock(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = linear(width, channels)

    def forward(self, x_bchw: Tensor, active_be: Tensor) -> Tensor:
        """(B, C, H, W) and (B, width), SiLU already applied -> (B, C, H, W)."""
        x_bnd = self.embed(x_bchw.flatten(2).transpose(1, 2)) + self.position_nd
        for block in self.blocks:
            x_bnd = block(x_bnd, active_be)
        return self.out(self.norm(x_bnd)).transpose(1, 2).reshape(x_bchw.shape)


class UViT(nn.Module):
    """Levels of residual blocks around a transformer, conditioned on time and on a class or on actions.

    Its first answer is exactly zero. The transformer's blocks are DiT's (adaLN-Zero, fixed sine and cosine positions);
    those of the paper are steered inside the MLP and learn their positions. Frames of history
    (`ActionCondition.context`) are not read.

    Args:
        latent_shape: (C, h, w) of what comes in and goes out; given by Stage1 and the connector.
        data_spec: what the conditions are; given by the dataset.
        token_width: of the transformer's tokens; a multiple of 4 and of heads.
        depth: transformer blocks.
        heads: of the attention.
        width: channels at the highest resolution.
        multipliers: channels of each convolutional level as multiples of `width`, the highest resolution first; the
            transformer works below the last one, at sides h / 2^len(multipliers) and w / 2^len(multipliers).
        blocks: residual blocks of each level on the way down; there is one more on the way up, and one beside the
            transformer.
        mlp_ratio: hidden width of the transformer's MLPs over `token_width`.
        dropout: in the transformer and the convolutions at its resolution only, as the paper advises (section 3.3).
        norm_groups: groups of every GroupNorm; must divide every `width * multiplier`.

    Raises:
        BadInput: a latent that is not (C, h, w) or whose sides the levels do not divide; a size below 1; widths that
            groups or heads do not divide; conditions that it cannot embed.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        token_width: int,
        depth: int,
        heads: int,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "blocks": blocks, "token_width": token_width, "depth": depth, "heads": heads}
        check_sizes(multipliers, norm_groups=norm_groups, **sizes)
        rows, columns = lowest_sides(latent_shape, len(multipliers))
        self.latent_shape = tuple(latent_shape)
        self.steering = TimeAndCondition(data_spec, token_width)
        levels = [Level(width * m, blocks) for m in multipliers]
        lowest = Level(levels[-1].channels, blocks=0, dropout=dropout)
        middle = TransformerMiddle(
            lowest.channels,
            rows,
            columns,
            width=token_width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        make = Blocks(steering=token_width, heads=heads, groups=norm_groups)
        self.u = UShape(latent_shape[0], [*levels, lowest], middle, make)

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
        check_latent(x_bchw, self.latent_shape)
        return self.u(x_bchw, self.steering(t_b, condition))
