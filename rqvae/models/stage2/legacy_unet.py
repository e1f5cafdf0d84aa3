"""The mask-conditional U-Net of DiffInfinite's descendants as it was, for comparison: it cannot learn a layout.

Reimplemented from the published network (Aversa et al. 2023, `dm.py` and `utils/modules.py` of the code; the class
vector as in its fork minha12/diffinfinite). With width 256, multipliers 1, 2, 4 and 5 classes it has 172,101,124
parameters. What it does wrong is kept: attention asks with `mask > 0`, the same for every class but 0, and the null
condition is class 0. Shapes: B batch, C channels, H W sides of a feature map, N = H W, E width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LatentShape
from rqvae.models.layers.mask_embedding import LegacyMaskEmbedding, checked_mask
from rqvae.models.layers.ushape import check_latent, check_sizes, lowest_sides

HEADS, HEAD_WIDTH = 4, 32
STANDARDISING_EPS = 1e-5


class LegacyUNet(nn.Module):
    """The original network, conditioned on a mask's class shares and on where the mask is not class 0.

    Args:
        latent_shape: (C, h, w) of what comes in and goes out; given by Stage1 and the connector.
        data_spec: must be of masks; given by the dataset.
        width: channels at the highest resolution; a multiple of 2.
        multipliers: channels that each level hands on, as multiples of `width`, the highest resolution first.
        blocks: residual blocks of each level, on the way down and on the way up.
        norm_groups: groups of every GroupNorm; must divide every `width * multiplier`.
        dropout: after both activations of every block; 0.05 in the original.

    Raises:
        BadInput: data without masks; a latent whose sides the levels do not divide; sizes that do not fit.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        width: int = 256,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        norm_groups: int = 2,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        check_sizes(multipliers, width=width, blocks=blocks, norm_groups=norm_groups)
        lowest_sides(latent_shape, len(multipliers) - 1)
        if not data_spec.num_mask_classes:
            raise BadInput("stage2.backbone: expected data of masks for LegacyUNet, got none")
        if wrong := [width * m for m in (1, *multipliers) if width * m % norm_groups]:
            raise BadInput(f"stage2.norm_groups: expected a divisor of {wrong[0]} channels, got {norm_groups}")
        self.latent_shape, self.num_classes = tuple(latent_shape), data_spec.num_mask_classes
        steering = 4 * width
        self.stem = nn.Conv2d(latent_shape[0], width, 7, padding=3)
        self.time = LegacyTimeEmbedding(width, steering)
        self.condition = LegacyMaskEmbedding(self.num_classes, width, steering)

        def block(inputs: int, outputs: int) -> _Block:
            return _Block(inputs, outputs, 2 * steering, norm_groups, dropout)

        channels = [width, *(width * m for m in multipliers)]
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (here, below) in enumerate(pairs):
            last = i == len(pairs) - 1
            change = nn.Conv2d(here, below, 3, padding=1) if last else nn.Conv2d(here, below, 4, stride=2, padding=1)
            self.down.append(_Down([block(here, here) for _ in range(blocks)], _BlindAttention(here), change))
        bottom = channels[-1]
        self.middle = nn.ModuleList([block(bottom, bottom), _BlindAttention(bottom), block(bottom, bottom)])
        for i, (above, here) in enumerate(reversed(pairs)):
            change = nn.Conv2d(here, above, 3, padding=1)
            enlarged = change if i == len(pairs) - 1 else nn.Sequential(nn.Upsample(scale_factor=2.0), change)
            level = [block(here + above, here) for _ in range(blocks)]
            self.up.append(_Up(level, _BlindAttention(here), enlarged))
        self.last = block(2 * width, width)
        self.out = nn.Conv2d(width, latent_shape[0], 1)

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """One answer.

        Args:
            x_bchw: (B, C, h, w).
            t_b: (B,) in [0, 1].
            condition: a `MaskCondition` of length B.

        Returns:
            (B, C, h, w).

        Raises:
            BadInput: another latent shape, or another kind of condition.
        """
        check_latent(x_bchw, self.latent_shape)
        mask_bhw = checked_mask(condition, self.num_classes)
        tissue_b1hw = ((mask_bhw > 0) & (mask_bhw < self.num_classes)).to(x_bchw.dtype)[:, None]
        active_be = F.silu(torch.cat((self.time(t_b), self.condition(condition)), dim=1))
        x_bchw = stem = self.stem(x_bchw)
        kept: list[Tensor] = []
        for level in self.down:
            x_bchw = level(x_bchw, active_be, tissue_b1hw, kept)
        x_bchw = self.middle[0](x_bchw, active_be)
        x_bchw = self.middle[2](self.middle[1](x_bchw, tissue_b1hw), active_be)
        for level in self.up:
            x_bchw = level(x_bchw, active_be, tissue_b1hw, kept)
        return self.out(self.last(torch.cat((x_bchw, stem), dim=1), active_be))


class LegacyTimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then Linear, GELU, Linear: (B,) -> (B, E).

    Args:
        frequencies: sinusoids, half sines and half cosines; at least 4.
        width: E.
    """

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, t_b: Tensor) -> Tensor:
        """(B,) in [0, 1] -> (B, E)."""
        t_b = t_b.to(torch.promote_types(t_b.dtype, torch.float32))
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=t_b.dtype, device=t_b.device) * (-math.log(10000) / (half - 1))
        angles = (1000 * t_b)[:, None] * exponents.exp()
        return self.mlp(torch.cat((angles.sin(), angles.cos()), dim=1).to(next(self.mlp.parameters()).dtype))


class _StandardisedConv(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 for each output (Qiao et al. 2019)."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + STANDARDISING_EPS)
        return F.conv2d(x_bchw, weight, self.bias, padding=self.padding)


class _Block(nn.Module):
    """Convolution, norm, SiLU, dropout, twice, around a shortcut; scale and shift after the first norm."""

    def __init__(self, inputs: int, outputs: int, steering: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.film = nn.Linear(steering, 2 * outputs)
        self.conv1, self.conv2 = (_StandardisedConv(n, outputs, 3, padding=1) for n in (inputs, outputs))
        self.norm1, self.norm2 = nn.GroupNorm(groups, outputs), nn.GroupNorm(groups, outputs)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_bchw: Tensor, active_be: Tensor) -> Tensor:
        scale_bc11, shift_bc11 = self.film(active_be)[:, :, None, None].chunk(2, dim=1)
        h_bchw = self.norm1(self.conv1(x_bchw)) * (1 + scale_bc11) + shift_bc11
        h_bchw = self.norm2(self.conv2(self.dropout(F.silu(h_bchw))))
        return self.dropout(F.silu(h_bchw)) + self.shortcut(x_bchw)


class _BlindAttention(nn.Module):
    """Attention whose queries know only where the mask is above 0; keys and values are of the normed features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.key_value = nn.Conv2d(channels, 2 * inner, 1, bias=False)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, x_bchw: Tensor, tissue_b1hw: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x_bchw, dim=1, correction=0, keepdim=True)
        normed_bchw = (x_bchw - mean) * torch.rsqrt(variance + STANDARDISING_EPS) * self.gain
        here_b1hw = F.max_pool2d(tissue_b1hw, tissue_b1hw.shape[-1] // x_bchw.shape[-1])
        query_bchw = self.query(here_b1hw.expand_as(x_bchw))
        maps = (query_bchw, *self.key_value(normed_bchw).chunk(2, dim=1))
        q_bhnd, k_bhnd, v_bhnd = (m.flatten(2).unflatten(1, (HEADS, HEAD_WIDTH)).transpose(2, 3) for m in maps)
        mixed_bhnd = F.scaled_dot_product_attention(q_bhnd, k_bhnd, v_bhnd)
        mixed_bchw = mixed_bhnd.transpose(2, 3).flatten(1, 2).unflatten(2, x_bchw.shape[2:])
        return x_bchw + self.out(mixed_bchw)


class _Level(nn.Module):
    """The blocks of a resolution, attention, and the way to the next resolution."""

    def __init__(self, blocks: Sequence[_Block], attention: _BlindAttention, change: nn.Module) -> None:
        super().__init__()
        self.blocks, self.attention, self.change = nn.ModuleList(blocks), attention, change


class _Down(_Level):
    """Puts each block's answer into `kept`, the last one's after the attention."""

    def forward(self, x_bchw: Tensor, active_be: Tensor, tissue_b1hw: Tensor, kept: list[Tensor]) -> Tensor:
        for i, block in enumerate(self.blocks):
            x_bchw = block(x_bchw, active_be)
            if i == len(self.blocks) - 1:
                x_bchw = self.attention(x_bchw, tissue_b1hw)
            kept.append(x_bchw)
        return self.change(x_bchw)


class _Up(_Level):
    """Takes one map out of `kept` for each block."""

    def forward(self, x_bchw: Tensor, active_be: Tensor, tissue_b1hw: Tensor, kept: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x_bchw = block(torch.cat((x_bchw, kept.pop()), dim=1), active_be)
        return self.change(self.attention(x_bchw, tissue_b1hw))
