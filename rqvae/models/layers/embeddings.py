"""Embeddings of position, time and condition."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition, Condition, DataSpec
from rqvae.models.layers.mask_embedding import MaskDistributionEmbedding


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """(N, width) sines, then cosines, of `positions` (N,) at width / 2 frequencies from 1 down to nearly 1/10000."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sincos_2d(width: int, rows: int, columns: int) -> Tensor:
    """Fixed position embedding of a grid, tokens in row-major order.

    The first half of the width encodes the column, the second the row, as in MAE (He et al. 2022) and DiT (Peebles &
    Xie 2023), whose weights therefore fit.

    Args:
        width: a multiple of 4.
        rows: height of the grid.
        columns: width of the grid.

    Returns:
        (rows columns, width) in the default float type; computed in float64.

    Raises:
        BadInput: a width that 4 does not divide.
    """
    if width % 4:
        raise BadInput(f"width: expected a multiple of 4 for the position embedding, got {width}")
    row_n = torch.arange(rows).repeat_interleave(columns)
    column_n = torch.arange(columns).repeat(rows)
    parts = (sincos_1d(width // 2, column_n), sincos_1d(width // 2, row_n))
    return torch.cat(parts, dim=1).to(torch.get_default_dtype())


class TimestepEmbedding(nn.Module):
    """Times in [0, 1] -> vectors: sinusoids of 1000 t, then Linear, SiLU, Linear (Peebles & Xie 2023, DiT).

    Args:
        width: of the result.
        frequencies: sinusoids, half cosines and half sines.
    """

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.first, self.second = nn.Linear(frequencies, width), nn.Linear(width, width)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t_b: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        # At least fp32 and not a buffer: in a module cast to bf16, 1000 t times a rounded frequency is off by radians.
        t_b = t_b.to(torch.promote_types(t_b.dtype, torch.float32))
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=t_b.dtype, device=t_b.device) * (-math.log(10000) / half)
        angles = (1000 * t_b)[:, None] * exponents.exp()
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class ClassEmbedding(nn.Module):
    """A learned vector a class, and one for the null class, which has index `num_classes`.

    Args:
        num_classes: real classes.
        width: of the vectors.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, condition: Condition | None) -> Tensor:
        """(B, width).

        Raises:
            BadInput: not a `ClassCondition`, or one with another number of classes.
        """
        if not isinstance(condition, ClassCondition) or condition.num_classes != self.num_classes:
            raise BadInput(f"condition: expected ClassCondition of {self.num_classes} classes, got {_name(condition)}")
        return self.table(condition.label)


class ActionEmbedding(nn.Module):
    """The sum over history slots of a learned vector for the slot's action.

    Each slot has vectors of its own, as the last action and the first mean different things: `num_actions` real ones,
    the null action (index `num_actions`) and one for missing history (mask False), which wins over the action.

    Args:
        num_actions: real actions.
        history: K, slots.
        width: of the vectors.
    """

    slot_k: Tensor

    def __init__(self, num_actions: int, history: int, width: int) -> None:
        super().__init__()
        if history < 1:
            raise BadInput(f"data.history: expected at least 1 slot for action conditions, got {history}")
        self.num_actions, self.history = num_actions, history
        self.table = nn.Embedding(history * (num_actions + 2), width)
        self.register_buffer("slot_k", torch.arange(history) * (num_actions + 2), persistent=False)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, condition: Condition | None) -> Tensor:
        """(B, width) from `actions` and `mask` (B, K); `context` is not read.

        Raises:
            BadInput: not an `ActionCondition`, or one with another number of actions or slots.
        """
        if not isinstance(condition, ActionCondition) or condition.num_actions != self.num_actions:
            raise BadInput(f"condition: expected ActionCondition of {self.num_actions} actions, got {_name(condition)}")
        if condition.actions.shape[1:] != (self.history,) or condition.mask.shape != condition.actions.shape:
            raise BadInput(
                f"condition: expected actions and mask (B, {self.history}), got {tuple(condition.actions.shape)} "
                f"and {tuple(condition.mask.shape)}"
            )
        missing = self.num_actions + 1
        index_bk = torch.where(condition.mask, condition.actions, missing) + self.slot_k
        return self.table(index_bk).sum(1)


class ConditionTokens(nn.Module):
    """Conditions as tokens for cross-attention: one for a class, one for each action of the history.

    Each history slot has vectors of its own. Missing history (mask False) gets no attention, so a token that is always
    visible stands beside the actions: a softmax over nothing is NaN.

    Args:
        data_spec: what the conditions are.
        width: D, of the tokens.

    Raises:
        BadInput: data without classes and actions, or with both.
    """

    slot_k: Tensor

    def __init__(self, data_spec: DataSpec, width: int) -> None:
        super().__init__()
        if bool(data_spec.num_classes) == bool(data_spec.num_actions):
            raise BadInput(
                f"data: expected classes or actions for the cross-attention, got num_classes {data_spec.num_classes}, "
                f"num_actions {data_spec.num_actions}"
            )
        self.data_spec = data_spec
        slots = data_spec.history if data_spec.num_actions else 1
        count = (data_spec.num_actions or data_spec.num_classes) + 1
        self.table = nn.Embedding(slots * count, width)
        self.register_buffer("slot_k", torch.arange(slots) * count, persistent=False)
        self.always = nn.Parameter(torch.randn(1, 1, width)) if data_spec.num_actions else None
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, condition: Condition | None) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) tokens, and (B, L) bool which of them are visible, None where all are.

        Raises:
            BadInput: another kind of condition than the data's.
        """
        spec = self.data_spec
        if self.always is None:
            if not isinstance(condition, ClassCondition) or condition.num_classes != spec.num_classes:
                raise BadInput(
                    f"condition: expected ClassCondition of {spec.num_classes} classes, got {_name(condition)}"
                )
            return self.norm(self.table(condition.label[:, None])), None
        if not isinstance(condition, ActionCondition) or condition.num_actions != spec.num_actions:
            raise BadInput(f"condition: expected ActionCondition of {spec.num_actions} actions, got {_name(condition)}")
        tokens_bkd = self.table(condition.actions + self.slot_k)
        tokens_bld = torch.cat((self.always.expand(len(tokens_bkd), -1, -1), tokens_bkd), dim=1)
        visible_bl = F.pad(condition.mask, (1, 0), value=True)
        return self.norm(tokens_bld), visible_bl


def condition_embedding(data_spec: DataSpec, width: int, *, masks: bool = False) -> nn.Module | None:
    """The embedding of the data's conditions as one vector (B, width); None for data without conditions.

    Args:
        data_spec: what the conditions are.
        width: of the vector.
        masks: whether the shares of a mask's classes are embedded; its layout, which one vector cannot hold, is the
            caller's then.

    Raises:
        BadInput: data with several kinds of conditions, or with masks that are not asked for.
    """
    kinds = (data_spec.num_classes, data_spec.num_actions, data_spec.num_mask_classes)
    if sum(map(bool, kinds)) > 1 or (data_spec.num_mask_classes and not masks):
        raise BadInput(
            f"data: expected classes or actions as the condition, got num_classes {data_spec.num_classes}, "
            f"num_actions {data_spec.num_actions}, num_mask_classes {data_spec.num_mask_classes}"
        )
    if data_spec.num_mask_classes:
        return MaskDistributionEmbedding(data_spec.num_mask_classes, width)
    if data_spec.num_actions:
        return ActionEmbedding(data_spec.num_actions, data_spec.history, width)
    return ClassEmbedding(data_spec.num_classes, width) if data_spec.num_classes else None


def _name(condition: Condition | None) -> str:
    """What came, for an error message."""
    if isinstance(condition, ClassCondition):
        return f"ClassCondition of {condition.num_classes} classes"
    if isinstance(condition, ActionCondition):
        return f"ActionCondition of {condition.num_actions} actions"
    return type(condition).__name__
