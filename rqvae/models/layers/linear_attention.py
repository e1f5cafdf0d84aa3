"""Blocks of the linear diffusion transformer: ReLU linear attention, Mix-FFN, adaLN-single.

Sana (Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers", 2024, section
2.2 and figure 5); the reference implementation is `SanaTransformer2DModel` of huggingface/diffusers. Shapes: B batch,
N tokens in row-major order, D width, H heads, d = D / H, L condition tokens.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.layers.transformer import linear, modulated_norm


def relu_linear_attention(q_bhnd: Tensor, k_bhnd: Tensor, v_bhnd: Tensor) -> Tensor:
    """sum_j relu(q_i).relu(k_j) v_j / sum_j relu(q_i).relu(k_j), in O(N d^2) instead of O(N^2 d) (Sana, eq. 1).

    The sums are over all tokens and are kept in fp32 at least: in fp16 they overflow at N = 1024.

    Args:
        q_bhnd: queries.
        k_bhnd: keys.
        v_bhnd: values.

    Returns:
        (B, H, N, d) in the queries' type; zero for a query without a positive part.
    """
    dtype = torch.promote_types(q_bhnd.dtype, torch.float32)
    # the meta device, where shapes are checked, knows no autocast
    with contextlib.nullcontext() if q_bhnd.is_meta else torch.autocast(q_bhnd.device.type, enabled=False):
        q, k, v = F.relu(q_bhnd).to(dtype), F.relu(k_bhnd).to(dtype), v_bhnd.to(dtype)
        weighted = q @ (k.transpose(-1, -2) @ v)
        weight = q @ k.sum(-2, keepdim=True).transpose(-1, -2)
        return (weighted / (weight + 1e-15)).to(q_bhnd.dtype)


class LinearSelfAttention(nn.Module):
    """Multi-head ReLU linear attention over all tokens.

    Args:
        width: D.
        heads: H.
        qk_norm: RMS norm of queries and keys over all heads.

    Raises:
        BadInput: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = _checked(width, heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        nn.init.xavier_uniform_(self.qkv.weight)
        self.norm_q, self.norm_k = _qk_norms(width, qk_norm)
        self.out = linear(width, width)

    def forward(self, x_bnd: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q_bnd, k_bnd, v_bnd = self.qkv(x_bnd).chunk(3, dim=-1)
        parts = (self.norm_q(q_bnd), self.norm_k(k_bnd), v_bnd)
        mixed_bhnd = relu_linear_attention(*(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts))
        return self.out(mixed_bhnd.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Softmax attention of image tokens to condition tokens; its answer begins at zero.

    Args:
        width: D.
        heads: H.
        qk_norm: RMS norm of queries and keys over all heads.

    Raises:
        BadInput: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = _checked(width, heads)
        self.q, self.kv = linear(width, width), linear(width, 2 * width)
        self.norm_q, self.norm_k = _qk_norms(width, qk_norm)
        self.out = linear(width, width, zero=True)

    def forward(self, x_bnd: Tensor, tokens_bld: Tensor, visible_bl: Tensor | None = None) -> Tensor:
        """(B, N, D), (B, L, D) and (B, L) bool, True where a token is seen -> (B, N, D).

        At least one token of each sample must be visible: a softmax over nothing is NaN.
        """
        k_bld, v_bld = self.kv(tokens_bld).chunk(2, dim=-1)
        parts = (self.norm_q(self.q(x_bnd)), self.norm_k(k_bld), v_bld)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mask = None if visible_bl is None else visible_bl[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """Gated feed-forward with a 3x3 depthwise convolution over the grid, from which tokens learn where they are.

    Args:
        width: D.
        ratio: hidden width over D.
    """

    def __init__(self, width: int, ratio: float = 2.5) -> None:
        super().__init__()
        hidden = int(ratio * width)
        self.expand = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.contract = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x_bnd: Tensor, rows: int) -> Tensor:
        """(B, N, D) of a grid with `rows` rows -> (B, N, D)."""
        x_bdhw = x_bnd.transpose(1, 2).unflatten(2, (rows, -1))
        value, gate = self.depthwise(F.silu(self.expand(x_bdhw))).chunk(2, dim=1)
        return self.contract(value * F.silu(gate)).flatten(2).transpose(1, 2)


class LinearBlock(nn.Module):
    """Linear attention, attention to the condition where there are heads for it, Mix-FFN.

    The modulation is adaLN-single (Chen et al. 2023, PixArt-alpha, section 2.3): one projection of the conditioning for
    all blocks, and a learned table a block.

    Args:
        width: D.
        heads: of the self-attention.
        cross_heads: of the attention to condition tokens; 0 is without.
        ratio: of the Mix-FFN.
        qk_norm: RMS norm of queries and keys.
        dropout: after attention and feed-forward.
    """

    def __init__(
        self, width: int, heads: int, *, cross_heads: int, ratio: float, qk_norm: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attention = LinearSelfAttention(width, heads, qk_norm)
        self.cross = CrossAttention(width, cross_heads, qk_norm) if cross_heads else None
        self.ffn = MixFFN(width, ratio)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_bnd: Tensor, modulation_b6d: Tensor, tokens_bld: Tensor | None, visible_bl: Tensor | None, rows: int
    ) -> Tensor:
        """One block.

        Args:
            x_bnd: (B, N, D) tokens.
            modulation_b6d: (B, 6, D) shift, scale and gate of attention, then of the feed-forward, for all blocks.
            tokens_bld: (B, L, D) condition tokens; read where the block has heads for them.
            visible_bl: (B, L) which of them are seen; None is all.
            rows: of the grid.

        Returns:
            (B, N, D).
        """
        parts = (self.table + modulation_b6d).chunk(6, dim=1)
        shift_attention, scale_attention, gate_attention, shift_ffn, scale_ffn, gate_ffn = parts
        mixed = self.dropout(self.attention(modulated_norm(x_bnd, shift_attention, scale_attention)))
        x_bnd = torch.addcmul(x_bnd, gate_attention, mixed)
        if self.cross is not None:
            assert tokens_bld is not None
            x_bnd = x_bnd + self.cross(x_bnd, tokens_bld, visible_bl)
        changed = self.dropout(self.ffn(modulated_norm(x_bnd, shift_ffn, scale_ffn), rows))
        return torch.addcmul(x_bnd, gate_ffn, changed)


def _checked(width: int, heads: int) -> int:
    if heads < 1 or width % heads:
        raise BadInput(f"stage2.heads: expected a divisor of width = {width}, got {heads}")
    return heads


def _qk_norms(width: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
