"""Blocks of convolutional autoencoders, the structure of the KL autoencoder of Rombach et al. 2022 (latent diffusion).

Shapes: B batch, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor, nn

from rqvae.errors import BadInput

# The value of latent diffusion's `Normalize` and of diffusers' `AutoencoderKL`; torch's own default is 1e-5.
NORM_EPS = 1e-6


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6.

    Raises:
        BadInput: `groups` does not divide `channels`.
    """
    if groups < 1 or channels % groups:
        raise BadInput(f"norm_groups: expected a divisor of {channels} channels, got {groups}")
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a shortcut: (B, in, H, W) -> (B, out, H, W).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ the shortcut is a 1x1 convolution.
        groups: groups of both norms.
        dropout: probability, before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h_bchw = self.conv1(F.silu(self.norm1(x_bchw)))
        h_bchw = self.conv2(self.dropout(F.silu(self.norm2(h_bchw))))
        return self.shortcut(x_bchw) + h_bchw


class SpatialAttention(nn.Module):
    """Self-attention over all positions of a feature map, one head as wide as the map has channels, with a residual.

    Args:
        channels: channels of the map.
        groups: groups of the norm in front.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens_blc = self.norm(x_bchw).flatten(2).transpose(1, 2)
        q_b1lc, k_b1lc, v_b1lc = self.qkv(tokens_blc).unsqueeze(1).chunk(3, dim=-1)
        mixed_blc = F.scaled_dot_product_attention(q_b1lc, k_b1lc, v_b1lc).squeeze(1)
        return x_bchw + self.out(mixed_blc).transpose(1, 2).reshape(x_bchw.shape)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded by one row and column at the bottom and right only (latent diffusion).

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x_bchw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 2, then a 3x3 convolution.

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x_bchw, scale_factor=2.0, mode="nearest"))


def bottleneck(channels: int, groups: int, dropout: float, attention: bool) -> nn.Sequential:
    """The middle of an autoencoder at its lowest resolution: block, attention where wanted, block."""
    first, last = (ResBlock(channels, channels, groups, dropout) for _ in range(2))
    return nn.Sequential(first, *([SpatialAttention(channels, groups)] if attention else []), last)
