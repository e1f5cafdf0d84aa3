"""The U of a diffusion network: down through the levels, a middle, and up again over skip connections.

What is in the middle is the caller's: convolutions and attention make a U-Net, a transformer makes a U-ViT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LatentShape
from rqvae.models.layers.conv import group_norm
from rqvae.models.layers.film import FilmResBlock, MapAttention, Resample, SteeredBlock, zeroed


@dataclass(frozen=True)
class Level:
    """One resolution of the U; each is half as high and wide as the one before.

    Args:
        channels: of its feature maps.
        blocks: residual blocks on the way down; there is one more on the way up.
        attention: after each of its blocks.
        dropout: inside its blocks.
    """

    channels: int
    blocks: int
    attention: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Blocks:
    """What all blocks of one network share, and how to make them.

    Args:
        steering: width of the steering vector.
        heads: of each attention.
        groups: of each norm.
    """

    steering: int
    heads: int
    groups: int

    def keep(self, level: Level, in_channels: int) -> SteeredBlock:
        """A block of a level, with its attention."""
        attention = MapAttention(level.channels, self.heads, self.groups) if level.attention else None
        block = FilmResBlock(
            in_channels, level.channels, steering=self.steering, groups=self.groups, dropout=level.dropout
        )
        return SteeredBlock(block, attention)

    def resample(self, level: Level, how: Resample) -> FilmResBlock:
        """From a level's resolution to the next one, in the level's channels; dropout is the level's."""
        return FilmResBlock(
            level.channels,
            level.channels,
            steering=self.steering,
            groups=self.groups,
            dropout=level.dropout,
            resample=how,
        )


class UpLevel(nn.Module):
    """A level on the way up: each block takes one skip connection, then the map is enlarged.

    Args:
        blocks: the level's blocks; each takes what came before and a skip connection, in this order of channels.
        enlarge: to the next level; None at the highest.
    """

    def __init__(self, blocks: Sequence[SteeredBlock], enlarge: FilmResBlock | None) -> None:
        super().__init__()
        self.blocks, self.enlarge = nn.ModuleList(blocks), enlarge

    def forward(self, x_bchw: Tensor, skips: Sequence[Tensor], active_be: Tensor) -> Tensor:
        """(B, C, H, W) and a skip connection a block -> (B, channels, 2H, 2W), at the highest (B, channels, H, W)."""
        for block, skip_bchw in zip(self.blocks, skips, strict=True):
            x_bchw = block(torch.cat((x_bchw, skip_bchw), dim=1), active_be)
        return x_bchw if self.enlarge is None else self.enlarge(x_bchw, active_be)


class UShape(nn.Module):
    """The U: (B, C, h, w) -> (B, C, h, w), exactly zero at first, as the last convolution begins at zero.

    As in ADM (Dhariwal & Nichol 2021), the skip connections are the first convolution, each block and each halving of
    the way down, and each of the one more block a level of the way up takes one.

    Args:
        channels: C.
        levels: highest resolution first.
        middle: `(x (B, c, H, W), active (B, E)) -> (B, c, H, W)` at the lowest level, c its channels.
        make: its blocks.
        more_inputs: channels of the input that come after the C and are not in the answer.
    """

    def __init__(
        self, channels: int, levels: Sequence[Level], middle: nn.Module, make: Blocks, more_inputs: int = 0
    ) -> None:
        super().__init__()
        top = levels[0].channels
        self.conv_in = nn.Conv2d(channels + more_inputs, top, 3, padding=1)
        self.down, skip_channels = nn.ModuleList(), [top]
        for i, level in enumerate(levels):
            if i:
                self.down.append(make.resample(levels[i - 1], "halve"))
                skip_channels.append(levels[i - 1].channels)
            for _ in range(level.blocks):
                self.down.append(make.keep(level, skip_channels[-1]))
                skip_channels.append(level.channels)
        self.middle = middle
        self.up, below = nn.ModuleList(), skip_channels[-1]
        for i, level in reversed(list(enumerate(levels))):
            blocks = []
            for _ in range(level.blocks + 1):
                blocks.append(make.keep(level, below + skip_channels.pop()))
                below = level.channels
            self.up.append(UpLevel(blocks, make.resample(level, "double") if i else None))
        self.skips_taken = [level.blocks + 1 for level in reversed(levels)]
        self.norm_out = group_norm(top, make.groups)
        self.conv_out = zeroed(nn.Conv2d(top, channels, 3, padding=1))

    def forward(self, x_bchw: Tensor, active_be: Tensor) -> Tensor:
        """(B, C, h, w) and the steering vector (B, E), SiLU already applied -> (B, C, h, w)."""
        x_bchw = self.conv_in(x_bchw)
        skips = [x_bchw]
        for block in self.down:
            x_bchw = block(x_bchw, active_be)
            skips.append(x_bchw)
        x_bchw = self.middle(x_bchw, active_be)
        for level, count in zip(self.up, self.skips_taken, strict=True):
            x_bchw = level(x_bchw, [skips.pop() for _ in range(count)], active_be)
        return self.conv_out(F.silu(self.norm_out(x_bchw)))


def lowest_sides(latent_shape: LatentShape, halvings: int) -> tuple[int, int]:
    """Height and width of a latent (C, h, w) after so many halvings.

    Raises:
        BadInput: not (C, h, w), or a side that 2^halvings does not divide.
    """
    if len(latent_shape) != 3:
        raise BadInput(f"stage2: expected a latent (C, h, w), got {tuple(latent_shape)}")
    _, height, width = latent_shape
    factor = 2**halvings
    if height % factor or width % factor:
        raise BadInput(f"stage2.multipliers: expected latent sides divisible by {factor}, got {height} x {width}")
    return height // factor, width // factor


def check_sizes(multipliers: Sequence[int], **sizes: int) -> None:
    """That there is a level, and that each of its multipliers and each of `sizes` is at least 1.

    Raises:
        BadInput: naming the first that is not.
    """
    if not multipliers or min(multipliers) < 1:
        raise BadInput(f"stage2.multipliers: expected at least one number, each >= 1, got {list(multipliers)}")
    for name, size in sizes.items():
        if size < 1:
            raise BadInput(f"stage2.{name}: expected a number >= 1, got {size}")


def check_latent(x_bchw: Tensor, latent_shape: LatentShape) -> None:
    """That a batch has the latent's shape.

    Raises:
        BadInput: another one.
    """
    if x_bchw.shape[1:] != tuple(latent_shape):
        raise BadInput(f"latent: expected (B, {str(tuple(latent_shape))[1:]}, got {tuple(x_bchw.shape)}")
