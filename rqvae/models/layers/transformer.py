"""Transformer blocks whose layer norms are steered by a conditioning vector (adaLN-Zero)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput


def linear(inputs: int, outputs: int, *, zero: bool = False) -> nn.Linear:
    """A linear layer as DiT begins: Xavier-uniform weight and zero bias, or all zero."""
    layer = nn.Linear(inputs, outputs)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulated_norm(x_bnd: Tensor, shift_b1d: Tensor, scale_b1d: Tensor) -> Tensor:
    """shift + (1 + scale) layer_norm(x), with no parameters of its own (Peebles & Xie 2023, DiT, sec. 3.2)."""
    normed = F.layer_norm(x_bnd, x_bnd.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_b1d, normed, 1 + scale_b1d)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens (Vaswani et al. 2017).

    Args:
        width: of the tokens; a multiple of heads.
        heads: how many.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"width: expected a multiple of heads = {heads}, got {width}")
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(self, x_bnd: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x_bnd).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(mixed.transpose(1, 2).flatten(2))


class AdaLNZeroBlock(nn.Module):
    """A transformer block that begins as the identity (Peebles & Xie 2023, DiT, fig. 3, adaLN-Zero).

    Args:
        width: of the tokens and of the conditioning vector.
        heads: of the attention.
        mlp_ratio: hidden width of the MLP over `width`.
        dropout: after attention and after MLP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.modulation = linear(width, 6 * width, zero=True)
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(linear(width, hidden), nn.GELU(approximate="tanh"), linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_bnd: Tensor, active_bd: Tensor) -> Tensor:
        """One block.

        Args:
            x_bnd: (B, N, D) tokens.
            active_bd: (B, D) conditioning vector, SiLU already applied (it is the same in every block).

        Returns:
            (B, N, D).
        """
        parts = self.modulation(active_bd).unsqueeze(1).chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts
        mixed = self.dropout(self.attention(modulated_norm(x_bnd, shift_attention, scale_attention)))
        x_bnd = torch.addcmul(x_bnd, gate_attention, mixed)
        changed = self.dropout(self.mlp(modulated_norm(x_bnd, shift_mlp, scale_mlp)))
        return torch.addcmul(x_bnd, gate_mlp, changed)
