"""A world model that is walked through: each generated frame becomes context of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition
from rqvae.models.interfaces import Stage1Encodings
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import generator, normal


def frame_noise(shape: tuple[int, ...], seed: int, dream: int, step: int) -> Tensor:
    """(C, h, w) noise of a dream's frame: a function of (seed, dream, step), so that any frame can be made again."""
    return normal(shape, generator=generator(seed, "dream", dream, step))


@dataclass
class Dream:
    """B dreams side by side. Frames are latents between steps: each is encoded or generated exactly once.

    Args:
        two_stage: the trained model.
        context_bkchw: (B, K, C, h, w) latents of the last K frames.
        actions_bk: (B, K) the actions taken at them; the last one is the next step's, and is not read before.
        num_actions: of the game.
        sampler: in place of the model's own.
    """

    two_stage: TwoStage
    context_bkchw: Tensor
    actions_bk: Tensor
    num_actions: int
    sampler: Any = None

    @classmethod
    @torch.no_grad()
    def begin(
        cls, two_stage: TwoStage, frames_bk3hw: Tensor, actions_bk: Tensor, num_actions: int, sampler: Any = None
    ) -> Dream:
        """Start from real frames.

        Args:
            two_stage: the trained model.
            frames_bk3hw: (B, K, 3, H, W) in [0, 1].
            actions_bk: (B, K - 1) the actions between them.
            num_actions: of the game.
            sampler: in place of the model's own.

        Raises:
            BadInput: other shapes, or an action out of range.
        """
        b, k = frames_bk3hw.shape[:2]
        if actions_bk.shape != (b, k - 1):
            raise BadInput(f"actions: expected ({b}, {k - 1}) between {k} frames, got {tuple(actions_bk.shape)}")
        check_actions(actions_bk, num_actions)
        encoded = two_stage.encode(frames_bk3hw.flatten(0, 1)).unflatten(0, (b, k))
        last = torch.full((b, 1), num_actions, device=actions_bk.device, dtype=actions_bk.dtype)
        # in the layout that `step` leaves behind: another one would be compiled once more at the second frame
        return cls(two_stage, encoded.contiguous(), torch.cat((actions_bk, last), dim=1), num_actions, sampler)

    @torch.no_grad()
    def step(self, action_b: Tensor, noise_bchw: Tensor) -> Tensor:
        """The frames (B, 3, H, W) in [0, 1] after these actions; the null action is `num_actions`.

        Args:
            action_b: (B,) int64.
            noise_bchw: (B, C, h, w) standard normal.

        Raises:
            BadInput: an action out of range, noise of another shape.
        """
        check_actions(action_b, self.num_actions + 1)
        self.actions_bk = torch.cat((self.actions_bk[:, :-1], action_b[:, None].to(self.actions_bk)), dim=1)
        seen = torch.ones_like(self.actions_bk, dtype=torch.bool)
        condition = ActionCondition(self.context_bkchw, self.actions_bk, seen, self.num_actions, encoded=True)
        output = self.two_stage.sample(condition, noise_bchw.to(self.context_bkchw), self.sampler)
        self.context_bkchw = torch.cat((self.context_bkchw[:, 1:], output.zs_pred[:, None]), dim=1)
        self.actions_bk = torch.cat((self.actions_bk[:, 1:], self.actions_bk[:, :1]), dim=1)  # the last is not read
        return self.two_stage.decode(Stage1Encodings(output.zs_pred))


def model_numbers(model_names: Sequence[str], game_names: Sequence[str]) -> tuple[int, ...]:
    """The model's number of each of a game's actions, by name; the same numbers where the model knows no names.

    Args:
        model_names: `DataSpec.names`.
        game_names: of the game, in its order.

    Raises:
        BadInput: the model was trained on other actions.
    """
    if not model_names:
        return tuple(range(len(game_names)))
    if set(model_names) != set(game_names):
        raise BadInput(f"actions: expected a model of {', '.join(game_names)}, got one of {', '.join(model_names)}")
    return tuple(model_names.index(name) for name in game_names)


def check_actions(actions: Tensor, count: int) -> None:
    """Raise BadInput unless all actions are in [0, count)."""
    if actions.numel() and (int(actions.min()) < 0 or int(actions.max()) >= count):
        raise BadInput(f"action: expected 0 to {count - 1}, got {int(actions.min())} to {int(actions.max())}")
