"""A U-Net for small images and latents, the one of ADM (Dhariwal & Nichol 2021, section 3).

A backbone: from a latent, a time and a condition to a latent. What its answer means (velocity, noise, data) is decided
by who trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LatentShape
from rqvae.models.layers.film import TimeAndCondition
from rqvae.models.layers.mask_embedding import MaskLayout
from rqvae.models.layers.ushape import Blocks, Level, UShape, check_latent, check_sizes, lowest_sides


class UNet(nn.Module):
    """ADM's U-Net, conditioned on time and on a class, actions or a mask by scale and shift of its norms.

    Its first answer is exactly zero. With width 192, multipliers [1, 2, 3, 4], blocks 3, attention [1, 2, 3] on
    (3, 64, 64) it is the paper's 296 M parameter model of ImageNet 64, up to the number of heads, which there grows
    with the channels. Frames of history (`ActionCondition.context`) are not read. Of a mask the shares of the classes
    at each latent position are further channels of the input; their shares of the whole mask steer the norms.

    Args:
        latent_shape: (C, h, w) of what comes in and goes out; given by Stage1 and the connector.
        data_spec: what the conditions are; given by the dataset.
        width: channels at the highest resolution.
        multipliers: channels of each level as multiples of `width`, the highest resolution first; every level after the
            first has half the sides of the one before.
        blocks: residual blocks of each level on the way down; there is one more on the way up.
        attention: levels (0 is the highest resolution) with attention after each block; the middle always has one.
        heads: of each attention; must divide the channels there.
        dropout: in every residual block.
        norm_groups: groups of every GroupNorm; must divide every `width * multiplier`.

    Raises:
        BadInput: a latent that is not (C, h, w) or whose sides the levels do not divide; a size below 1; attention at a
            level that there is not; groups or heads that do not divide the channels; conditions that it cannot embed.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1, 2),
        heads: int = 4,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(multipliers, width=width, blocks=blocks, heads=heads, norm_groups=norm_groups)
        lowest_sides(latent_shape, len(multipliers) - 1)
        if not set(attention) <= set(range(len(multipliers))):
            raise BadInput(f"stage2.attention: expected levels 0 to {len(multipliers) - 1}, got {list(attention)}")
        self.latent_shape = tuple(latent_shape)
        make = Blocks(steering=4 * width, heads=heads, groups=norm_groups)
        levels = [Level(width * m, blocks, i in attention, dropout) for i, m in enumerate(multipliers)]
        self.layout = MaskLayout(data_spec, self.latent_shape) if data_spec.num_mask_classes else None
        self.steering = TimeAndCondition(data_spec, make.steering, masks=True)
        more = self.layout.channels if self.layout is not None else 0
        self.u = UShape(latent_shape[0], levels, _Middle(levels[-1], make), make, more_inputs=more)

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
        steering_be = self.steering(t_b, condition)
        if self.layout is not None:
            x_bchw = torch.cat((x_bchw, self.layout(condition, x_bchw)), dim=1)
        return self.u(x_bchw, steering_be)


class _Middle(nn.Module):
    """Block, attention, block at the lowest level."""

    def __init__(self, level: Level, make: Blocks) -> None:
        super().__init__()
        self.first = make.keep(replace(level, attention=True), level.channels)
        self.second = make.keep(replace(level, attention=False), level.channels)

    def forward(self, x_bchw: Tensor, active_be: Tensor) -> Tensor:
        return self.second(self.first(x_bchw, active_be), active_be)
