"""A linear diffusion transformer over windows of frames: each frame has a noise level of its own and sees no later one.

Diffusion forcing (Chen et al., "Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion", 2024, section
3.1): where every frame of a window is noised by a level of its own, one network learns to predict a frame after clean
frames, after noisy ones, and after none. Within a frame it is the transformer of Sana (`linear_dit.py`); between frames
tokens of one place attend causally, as in the temporal layers of latent video diffusion (Blattmann et al. 2023).

Shapes: B batch, S frames of a window, N tokens of a frame, D width, H heads of the temporal attention, d = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LatentShape
from rqvae.models.layers.embeddings import TimestepEmbedding
from rqvae.models.layers.linear_attention import LinearBlock
from rqvae.models.layers.transformer import linear, modulated_norm

FIRST_BIAS = 3.0
"""Of the distance at which a head begins: of five frames it then has 83 % of the attention."""


@dataclass(frozen=True)
class Memory:
    """What later frames read of earlier ones: their keys and values, which no later frame changes.

    Args:
        blocks: (keys, values) of each block, (B, N, H, S, d).
        visible_bs: (B, S) bool, False where a frame is missing.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    visible_bs: Tensor

    def __len__(self) -> int:
        return self.visible_bs.shape[1]


class TemporalAttention(nn.Module):
    """Softmax attention of each token to the tokens at its place in this frame and in the frames before it.

    What it knows of time is a learned bias a head and distance, so that a window may lie anywhere. Each head begins at
    a distance of its own, the first one at the frame before, so that all heads together begin as a convolution over
    time: from biases of zero, which was tried, frames must first be told apart. Its answer begins at zero.

    Args:
        width: D.
        heads: H.
        window: most frames that are seen, the present one included.

    Raises:
        BadInput: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise BadInput(f"stage2.temporal_heads: expected a divisor of width = {width}, got {heads}")
        self.heads, self.window = heads, window
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width, zero=True)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads, eps=1e-5), nn.RMSNorm(width // heads, eps=1e-5)
        begins_at = torch.eye(window)[1 + torch.arange(heads) % max(1, window - 1)]
        self.distance = nn.Parameter(FIRST_BIAS * begins_at)

    def forward(
        self, x_bsnd: Tensor, visible_bk: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One attention.

        Args:
            x_bsnd: (B, S, N, D) the tokens of the last S frames.
            visible_bk: (B, K) which of all K frames, those before included, are seen; a frame always sees itself.
            before: keys and values (B, N, H, K - S, d) of the frames before.

        Returns:
            (B, S, N, D) what is added to the tokens, and the keys and values (B, N, H, S, d) of these frames.
        """
        parts = self.qkv(self.norm(x_bsnd)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 2, 4, 1, 5)
        q, k, v = self.norm_q(parts[0]), self.norm_k(parts[1]), parts[2]
        own = (k, v)
        if before is not None:
            k, v = torch.cat((before[0], k), dim=3), torch.cat((before[1], v), dim=3)
        bias = self._bias(q.shape[3], visible_bk).to(q.dtype).expand(-1, q.shape[1], -1, -1, -1)
        # four dimensions, as the exporter to ONNX asks
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=bias.flatten(0, 1))
        return self.out(mixed.unflatten(0, q.shape[:2]).permute(0, 3, 1, 2, 4).flatten(3)), own

    def _bias(self, queries: int, visible_bk: Tensor) -> Tensor:
        """(B, 1, H, S, K): the bias of each distance; minus infinity for later, missing, and too early frames."""
        keys = visible_bk.shape[1]
        place_k = torch.arange(keys, device=visible_bk.device)
        apart_sk = place_k[keys - queries :, None] - place_k
        seen_sk = (apart_sk >= 0) & (apart_sk < self.window)
        seen = seen_sk & (visible_bk[:, None] | (apart_sk == 0))
        bias = self.distance[:, apart_sk.clamp(0, self.window - 1)]
        return bias[None].masked_fill(~seen[:, None], float("-inf"))[:, None]


class CausalBlock(nn.Module):
    """Causal attention between frames, then a block of the linear transformer on each frame by itself.

    In this order what a frame takes from those before it is mixed with its neighbourhood in every block, the last one
    included: sprites move between places, and the attention stays at one.

    Args:
        spatial: works on (B S, N, D).
        temporal: works between frames.
    """

    def __init__(self, spatial: LinearBlock, temporal: TemporalAttention) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal

    def forward(
        self,
        x_bsnd: Tensor,
        modulation_bs6d: Tensor,
        visible_bk: Tensor,
        before: tuple[Tensor, Tensor] | None,
        rows: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, S, N, D) with its frames' modulation (B, S, 6, D) -> (B, S, N, D); otherwise as `TemporalAttention`."""
        change_bsnd, own = self.temporal(x_bsnd, visible_bk, before)
        x_bmnd, modulation_bm6d = (x_bsnd + change_bsnd).flatten(0, 1), modulation_bs6d.flatten(0, 1)
        return self.spatial(x_bmnd, modulation_bm6d, None, None, rows).unflatten(0, x_bsnd.shape[:2]), own


class CausalDiT(nn.Module):
    """The transformer over windows, conditioned on each frame's noise level and on the action that led to it.

    Its first answer is exactly zero. A frame's answer depends on this frame and on those before it, so that keys and
    values of frames that are done are kept (`Memory`) and never computed again.

    Args:
        latent_shape: (C, h, w) of one frame.
        data_spec: the actions; its `history` + 1 is how many frames are seen at most.
        depth: number of blocks.
        width: of the tokens; a multiple of heads and of temporal_heads.
        heads: of the linear attention within a frame.
        temporal_heads: of the attention between frames.
        patch: side of the square of latent pixels that is one token.
        ffn_ratio: hidden width of the Mix-FFN over `width`.
        qk_norm: RMS norm of queries and keys of the linear attention.
        dropout: after attention and feed-forward of each block.

    Raises:
        BadInput: a latent that the patch does not divide, a width that does not fit, data without actions.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        temporal_heads: int = 4,
        patch: Literal[1, 2, 4, 8] = 1,
        ffn_ratio: float = 2.5,
        qk_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise BadInput(f"stage2: expected depth and width >= 1, got {depth}, {width}")
        if len(latent_shape) != 3 or latent_shape[1] % patch or latent_shape[2] % patch:
            raise BadInput(
                f"stage2.patch: expected a latent (C, h, w) with sides divisible by {patch}, got {latent_shape}"
            )
        if not data_spec.num_actions:
            raise BadInput("stage2: expected data with actions for a network over windows of frames, got none")
        self.frame_shape, self.window = tuple(latent_shape), data_spec.history + 1
        self.patch, self.rows = patch, latent_shape[1] // patch
        self.embed = nn.Conv2d(latent_shape[0], width, patch, stride=patch)
        nn.init.xavier_uniform_(self.embed.weight.view(width, -1))
        self.time = TimestepEmbedding(width)
        self.unknown = data_spec.num_actions + 1
        self.action = nn.Embedding(self.unknown + 1, width)
        nn.init.normal_(self.action.weight, std=0.02)
        self.modulation = linear(width, 6 * width)
        options = {"cross_heads": 0, "ratio": ffn_ratio, "qk_norm": qk_norm, "dropout": dropout}
        self.blocks = nn.ModuleList(
            CausalBlock(
                LinearBlock(width, heads, **options),  # type: ignore[arg-type]
                TemporalAttention(width, temporal_heads, self.window),
            )
            for _ in range(depth)
        )
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = linear(width, patch**2 * latent_shape[0], zero=True)

    def forward(
        self, frames_bschw: Tensor, t_bs: Tensor, led_bs: Tensor, visible_bs: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, Memory]:
        """The answers for consecutive frames.

        Args:
            frames_bschw: (B, S, C, h, w), each noised by its own level.
            t_bs: (B, S) the levels, in [0, 1].
            led_bs: (B, S) int64, the action that led to each frame; `num_actions` is the null action,
                `unknown` = `num_actions` + 1 says that nobody knows.
            visible_bs: (B, S) bool, False for a frame that is missing: no other frame sees it.
            memory: of the frames before these; None where they are the first.

        Returns:
            (B, S, C, h, w), and the memory of all frames until now, of which the last `window` - 1 are kept.

        Raises:
            BadInput: frames of another shape.
        """
        if frames_bschw.shape[2:] != self.frame_shape:
            raise BadInput(f"frames: expected (B, S, {str(self.frame_shape)[1:]}, got {tuple(frames_bschw.shape)}")
        count = frames_bschw.shape[:2]
        steering_bsd = self.time(t_bs.flatten()).unflatten(0, count) + self.action(led_bs)
        modulation_bs6d = self.modulation(F.silu(steering_bsd)).unflatten(2, (6, -1))
        x_bsnd = self.embed(frames_bschw.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, count)
        x_bsnd = x_bsnd + steering_bsd[:, :, None]  # other frames see how noisy this one is, and what led to it
        seen_bk = visible_bs if memory is None else torch.cat((memory.visible_bs, visible_bs), dim=1)
        kept = []
        for i, block in enumerate(self.blocks):
            before = None if memory is None else memory.blocks[i]
            x_bsnd, own = block(x_bsnd, modulation_bs6d, seen_bk, before, self.rows)
            kept.append(own if before is None else _joined(before, own))
        shift, scale = (self.final_table + steering_bsd[:, :, None]).chunk(2, dim=2)
        answer_bsnd = self.final(modulated_norm(x_bsnd, shift, scale))
        grid = answer_bsnd.flatten(0, 1).unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.rows, -1))
        frames = grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).unflatten(0, count)
        return frames, self._last(Memory(tuple(kept), seen_bk))

    def _last(self, memory: Memory) -> Memory:
        """Only what a next frame can see."""
        if len(memory) < self.window:
            return memory
        first = len(memory) - self.window + 1
        blocks = tuple((k[:, :, :, first:], v[:, :, :, first:]) for k, v in memory.blocks)
        return Memory(blocks, memory.visible_bs[:, first:])


def _joined(before: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat((before[0], own[0]), dim=3), torch.cat((before[1], own[1]), dim=3)
