"""Blocks of diffusion U-Nets: residual blocks steered by a vector (FiLM), and attention over a feature map.

The structure is that of ADM (Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 3;
openai/guided-diffusion, guided_diffusion/unet.py), which diffusers' `UNet2DModel` can be set to as well.
Shapes: B batch, C channels, H and W height and width of a feature map, E width of the steering vector.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec
from rqvae.models.layers.conv import group_norm
from rqvae.models.layers.embeddings import TimestepEmbedding, condition_embedding
from rqvae.models.layers.transformer import SelfAttention

Resample = Literal["keep", "halve", "double"]


class TimeAndCondition(nn.Module):
    """One steering vector from the time and the condition: SiLU of the sum of their embeddings.

    Args:
        data_spec: what the conditions are.
        width: E.
        masks: whether masks are embedded too, by the shares of their classes: for a network that is told their layout
            in another way.

    Raises:
        BadInput: conditions that one vector cannot hold.
    """

    def __init__(self, data_spec: DataSpec, width: int, *, masks: bool = False) -> None:
        super().__init__()
        self.time = TimestepEmbedding(width)
        self.condition = condition_embedding(data_spec, width, masks=masks)

    def forward(self, t_b: Tensor, condition: Condition | None) -> Tensor:
        """(B,) in [0, 1] and a condition of length B, None exactly where the data have none -> (B, E).

        Raises:
            BadInput: another kind of condition than the data's.
        """
        embedded_be = self.time(t_b)
        if self.condition is not None:
            embedded_be = embedded_be + self.condition(condition)
        elif condition is not None:
            raise BadInput(f"condition: expected None (the data have none), got {type(condition).__name__}")
        return F.silu(embedded_be)


class FilmResBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the steering vector (ADM's adaptive group norm).

    h = conv1(resample(silu(norm1(x)))), then conv2(silu((1 + scale) norm2(h) + shift)) + shortcut(resample(x)). The
    second convolution begins at zero, so the block begins as its shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ the shortcut is a 1x1 convolution.
        steering: E.
        groups: of both norms.
        dropout: probability, before the second convolution.
        resample: keep the sides, halve them (mean of 2x2) or double them (nearest neighbour), as BigGAN does it inside
            the block (Brock et al. 2019, fig. 15).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        steering: int,
        groups: int,
        dropout: float = 0.0,
        resample: Resample = "keep",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(steering, 2 * out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_bchw: Tensor, active_be: Tensor) -> Tensor:
        """(B, in, H, W) and (B, E), SiLU already applied -> (B, out, H', W'), H' = H, H/2 or 2H."""
        h_bchw = self.conv1(self._resampled(F.silu(self.norm1(x_bchw))))
        scale_bc11, shift_bc11 = self.film(active_be)[:, :, None, None].chunk(2, dim=1)
        h_bchw = torch.addcmul(shift_bc11, self.norm2(h_bchw), 1 + scale_bc11)
        h_bchw = self.conv2(self.dropout(F.silu(h_bchw)))
        return self.shortcut(self._resampled(x_bchw)) + h_bchw

    def _resampled(self, x_bchw: Tensor) -> Tensor:
        if self.resample == "halve":
            return F.avg_pool2d(x_bchw, 2)
        if self.resample == "double":
            return F.interpolate(x_bchw, scale_factor=2.0, mode="nearest")
        return x_bchw


class MapAttention(nn.Module):
    """Multi-head self-attention over all positions of a feature map, with a residual; it begins as the identity.

    It knows no positions: those come from the convolutions' padding around it.

    Args:
        channels: of the map; a multiple of heads.
        heads: how many.
        groups: of the norm in front.
    """

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.attention = SelfAttention(channels, heads)
        zeroed(self.attention.out)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens_bnc = self.norm(x_bchw).flatten(2).transpose(1, 2)
        return x_bchw + self.attention(tokens_bnc).transpose(1, 2).reshape(x_bchw.shape)


class SteeredBlock(nn.Module):
    """A `FilmResBlock`, and attention after it where there is any.

    Args:
        block: comes first.
        attention: on its answer; None is without.
    """

    def __init__(self, block: FilmResBlock, attention: MapAttention | None = None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x_bchw: Tensor, active_be: Tensor) -> Tensor:
        """(B, in, H, W) and (B, E) -> (B, out, H', W')."""
        x_bchw = self.block(x_bchw, active_be)
        return x_bchw if self.attention is None else self.attention(x_bchw)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer, its weight and bias set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
