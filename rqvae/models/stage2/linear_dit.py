"""The linear diffusion transformer of Sana (Xie et al. 2024) as a backbone for latents, frames and actions.

Linear attention has O(N) cost; where tokens are, they learn from the depthwise convolution of the Mix-FFN, so that the
model takes any grid size. At equal budget on game frames the Mix-FFN was worth 2 dB over a plain DiT.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LatentShape
from rqvae.models.layers.embeddings import ConditionTokens, TimestepEmbedding, condition_embedding
from rqvae.models.layers.linear_attention import LinearBlock
from rqvae.models.layers.transformer import linear, modulated_norm


class LinearDiT(nn.Module):
    """Sana's transformer, conditioned on time, and on classes or actions by modulation, by attention, or by both.

    Its first answer is exactly zero. Frames of history (`ActionCondition.context`) are not read: what is to be seen is
    put into the input channels.

    Args:
        latent_shape: (C, h, w) of what goes out, and of what comes in unless `in_channels` says more.
        data_spec: what the conditions are; given by the dataset.
        depth: number of blocks.
        width: of the tokens; a multiple of heads and of cross_heads.
        heads: of the linear attention; Sana has 32 channels a head.
        cross_heads: of the attention to condition tokens.
        patch: side of the square of latent pixels that is one token.
        ffn_ratio: hidden width of the Mix-FFN over `width`.
        conditioning: adaln adds the condition to the time embedding, cross_attention attends to one token a class or
            action, both does both.
        qk_norm: RMS norm of queries and keys; keeps bf16 training stable.
        dropout: after attention and feed-forward of each block.
        in_channels: channels that come in, where frames of history are stacked on the latent; null is C.

    Raises:
        BadInput: a latent that the patch does not divide, a width that does not fit, conditions it cannot embed.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        cross_heads: int = 4,
        patch: Literal[1, 2, 4, 8] = 1,
        ffn_ratio: float = 2.5,
        conditioning: Literal["adaln", "cross_attention", "both"] = "both",
        qk_norm: bool = True,
        dropout: float = 0.0,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise BadInput(f"stage2: expected depth and width >= 1, got {depth}, {width}")
        if len(latent_shape) != 3 or latent_shape[1] % patch or latent_shape[2] % patch:
            raise BadInput(
                f"stage2.patch: expected a latent (C, h, w) with sides divisible by {patch}, got {latent_shape}"
            )
        self.in_shape = (in_channels or latent_shape[0], *latent_shape[1:])
        self.patch, self.rows = patch, latent_shape[1] // patch
        self.embed = nn.Conv2d(self.in_shape[0], width, patch, stride=patch)
        nn.init.xavier_uniform_(self.embed.weight.view(width, -1))
        self.time = TimestepEmbedding(width)
        attends = conditioning != "adaln" and bool(data_spec.num_classes or data_spec.num_actions)
        self.condition = condition_embedding(data_spec, width) if conditioning != "cross_attention" else None
        self.tokens = ConditionTokens(data_spec, width) if attends else None
        self.has_condition = bool(data_spec.num_classes or data_spec.num_actions)
        self.modulation = linear(width, 6 * width)
        cross = cross_heads if attends else 0
        self.blocks = nn.ModuleList(
            LinearBlock(width, heads, cross_heads=cross, ratio=ffn_ratio, qk_norm=qk_norm, dropout=dropout)
            for _ in range(depth)
        )
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = linear(width, patch**2 * latent_shape[0], zero=True)

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """One answer.

        Args:
            x_bchw: (B, in_channels, h, w).
            t_b: (B,) in [0, 1].
            condition: of length B; None exactly where the data have none.

        Returns:
            (B, C, h, w).

        Raises:
            BadInput: another shape, or another kind of condition than the data's.
        """
        if x_bchw.shape[1:] != self.in_shape:
            raise BadInput(f"latent: expected (B, {str(self.in_shape)[1:]}, got {tuple(x_bchw.shape)}")
        if not self.has_condition and condition is not None:
            raise BadInput(f"condition: expected None (the data have none), got {type(condition).__name__}")
        steering_bd = self.time(t_b)
        if self.condition is not None:
            steering_bd = steering_bd + self.condition(condition)
        tokens_bld, visible_bl = self.tokens(condition) if self.tokens is not None else (None, None)
        return self.trunk(x_bchw, steering_bd, tokens_bld, visible_bl)

    def trunk(
        self, x_bchw: Tensor, steering_bd: Tensor, tokens_bld: Tensor | None, visible_bl: Tensor | None = None
    ) -> Tensor:
        """The transformer itself, under conditions that are embedded already.

        Args:
            x_bchw: (B, in_channels, h, w).
            steering_bd: (B, width) time and condition, before the SiLU.
            tokens_bld: (B, L, width) for the cross-attention, where there is one.
            visible_bl: (B, L) bool; None is all.

        Returns:
            (B, C, h, w).
        """
        modulation_b6d = self.modulation(F.silu(steering_bd)).unflatten(1, (6, -1))
        x_bnd = self.embed(x_bchw).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x_bnd = block(x_bnd, modulation_b6d, tokens_bld, visible_bl, self.rows)
        shift, scale = (self.final_table + steering_bd[:, None]).chunk(2, dim=1)
        answer_bnd = self.final(modulated_norm(x_bnd, shift, scale))
        grid = answer_bnd.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.rows, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def weights_from_sana(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a diffusers `SanaTransformer2DModel` under the names of `LinearDiT`.

    Its caption projection and norm have no counterpart: condition tokens here are learned directly. What remains of
    ours without weights is the embedding of the conditions.

    Args:
        state: its state dict.

    Returns:
        A state dict for `load_state_dict(..., strict=False)`.
    """
    renamed = {
        "patch_embed.proj.": "embed.",
        "time_embed.emb.timestep_embedder.linear_1.": "time.first.",
        "time_embed.emb.timestep_embedder.linear_2.": "time.second.",
        "time_embed.linear.": "modulation.",
        "proj_out.": "final.",
        "transformer_blocks.": "blocks.",
        "attn1.": "attention.",
        "attn2.": "cross.",
        "to_out.0.": "out.",
        "cross.to_q.": "cross.q.",
        "ff.conv_inverted.": "ffn.expand.",
        "ff.conv_depth.": "ffn.depthwise.",
        "ff.conv_point.": "ffn.contract.",
        "scale_shift_table": "table",
    }
    ours = {}
    for name, value in state.items():
        for theirs, here in renamed.items():
            name = name.replace(theirs, here)  # noqa: PLW2901
        ours["final_table" if name == "table" else name] = value
    joins = {"attention.to_q.": ("attention.qkv.", "qkv"), "cross.to_k.": ("cross.kv.", "kv")}
    for name in [n for n in ours if any(key in n for key in joins)]:
        key = next(k for k in joins if k in name)
        joined, letters = joins[key]
        parts = [ours.pop(name.replace(key, f"{key[:-2]}{letter}.")) for letter in letters]
        ours[name.replace(key, joined)] = torch.cat(parts)
    return {name: value for name, value in ours.items() if not name.startswith("caption_")}
