"""The networks of next-frame models: how frames of history and the noisy frame meet in one backbone.

Each is called as `(x (B, C, h, w), t (B,), ActionCondition) -> (B, C, h, w)` and answers in the space of x. Shapes: B
batch, K history frames, S = K + 1, C h w channels, height and width of what is noised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from rqvae.contracts import check_shape
from rqvae.errors import BadInput
from rqvae.models.codec import Codec
from rqvae.models.interfaces import ActionCondition, Condition, DataSpec, LatentShape
from rqvae.models.layers.conv import group_norm
from rqvae.models.stage2.causal_dit import CausalDiT, Memory

MakeBackbone = Callable[[LatentShape, DataSpec], nn.Module]
HistoryEncoder = Literal["conv2d", "conv3d"]


class ConcatBackbone(nn.Module):
    """Context latents beside the noisy target in the channels of one network, whose last C answers are read.

    Args:
        latent_shape: (C, h, w) of one frame.
        data_spec: `history` K and the actions.
        backbone: class of the network; made for (K + 1) C channels.
        residual: add the last context latent to the answer, so that the untrained model copies it.
    """

    def __init__(self, latent_shape: LatentShape, data_spec: DataSpec, backbone: MakeBackbone, residual: bool) -> None:
        super().__init__()
        self.context_shape = (data_spec.history, *latent_shape)
        self.residual = residual
        channels = (data_spec.history + 1) * latent_shape[0]
        self.network = of_one_frame(backbone((channels, *latent_shape[1:]), data_spec))

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """(B, C, h, w) noisy target, (B,) times and an `ActionCondition` with context (B, K, C, h, w) -> (B, C, h, w).

        Raises:
            BadInput: a condition without context, or one of another shape.
        """
        context_bkchw = read_context(condition, self.context_shape).to(x_bchw)
        stacked = torch.cat((context_bkchw.flatten(1, 2), x_bchw), dim=1)
        answer_bchw = self.network(stacked, t_b, condition)[:, -x_bchw.shape[1] :]
        return answer_bchw + context_bkchw[:, -1] if self.residual else answer_bchw


class HistoryBackbone(nn.Module):
    """Context and noisy target through a small convolutional network to C channels, then the backbone.

    Args:
        latent_shape: (C, h, w) of one frame.
        data_spec: `history` K and the actions.
        backbone: class of the network; made for C channels.
        encoder: conv2d treats the frames as channels, conv3d convolves over time as well.
        residual: add the last context latent to the answer, so that the untrained model copies it.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        backbone: MakeBackbone,
        encoder: HistoryEncoder,
        residual: bool,
    ) -> None:
        super().__init__()
        self.context_shape = (data_spec.history, *latent_shape)
        self.residual = residual
        self.history = history_encoder(encoder, data_spec.history + 1, latent_shape[0])
        self.network = of_one_frame(backbone(latent_shape, data_spec))

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """As `ConcatBackbone.forward`."""
        context_bkchw = read_context(condition, self.context_shape).to(x_bchw)
        frames_bkchw = torch.cat((context_bkchw, x_bchw[:, None]), dim=1)
        answer_bchw = self.network(self.history(frames_bkchw), t_b, condition)
        return answer_bchw + context_bkchw[:, -1] if self.residual else answer_bchw


class HistoryVAEBackbone(nn.Module):
    """Frames and noisy frame in pixels, through a history encoder and the frozen autoencoder, to the backbone and back.

    cat(history, x_t) -> convolutions to 3 channels -> encode -> network on latents -> decode. The encoder is frozen,
    but gradients flow through it: without them the convolutions never learn. The autoencoder is held, not registered,
    so that neither state dict nor average has a copy of it.

    Args:
        latent_shape: (C, h, w) of one frame, behind the autoencoder.
        data_spec: `history` K, the actions, and the image's shape.
        backbone: class of the network; made for C channels.
        encoder: conv2d treats the frames as channels, conv3d convolves over time as well.
        residual: the convolutions add to the last frame and the network adds to its latent, both from zero, so that the
            untrained model answers with the last frame as the autoencoder shows it.
    """

    codec: Codec | None = None

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        backbone: MakeBackbone,
        encoder: HistoryEncoder,
        residual: bool,
    ) -> None:
        super().__init__()
        self.context_shape = (data_spec.history, *data_spec.image_shape)
        self.residual, self.latent_shape = residual, tuple(latent_shape)
        self.history = history_encoder(encoder, data_spec.history + 1, data_spec.image_shape[0], zero=residual)
        self.network = of_one_frame(backbone(latent_shape, data_spec))

    def latent(self, x_b3hw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """(B, C, h, w): the network's answer in the autoencoder's space, from pixels (B, 3, H, W) in [-1, 1].

        Raises:
            BadInput: no autoencoder was given; a condition without context, or one of another shape.
        """
        context_bk3hw = read_context(condition, self.context_shape).to(x_b3hw)
        mixed_b3hw = self.history(torch.cat((context_bk3hw, x_b3hw[:, None]), dim=1))
        if self.residual:
            mixed_b3hw = mixed_b3hw + context_bk3hw[:, -1]
        latent_bchw = given(self.codec).encode((mixed_b3hw + 1) / 2)
        answer_bchw = self.network(latent_bchw, t_b, condition)
        check_shape(answer_bchw, (len(x_b3hw), *self.latent_shape), "stage2.backbone")
        return latent_bchw + answer_bchw if self.residual else answer_bchw

    def forward(self, x_b3hw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """The answer as pixels (B, 3, H, W) in [-1, 1]; otherwise as `latent`."""
        return 2 * given(self.codec).decode(self.latent(x_b3hw, t_b, condition)) - 1


class CausalBackbone(nn.Module):
    """A network over windows of frames, each at a noise level of its own.

    Args:
        latent_shape: (C, h, w) of one frame.
        data_spec: `history` K and the actions.
        backbone: class of the network, a `CausalDiT`.
        residual: add the frame before to each answer: itself where it is clean, as it is while one plays, and the
            network's answer for it where it is noised. Adding the noised frame, however weighted, leaves its noise to
            be cancelled: in 400 steps eight windows were then learned to 25 % of the first loss, this way to 3 %.

    Raises:
        BadInput: a network of another kind.
    """

    def __init__(self, latent_shape: LatentShape, data_spec: DataSpec, backbone: MakeBackbone, residual: bool) -> None:
        super().__init__()
        self.context_shape = (data_spec.history, *latent_shape)
        self.residual = residual
        network = backbone(latent_shape, data_spec)
        if not isinstance(network, CausalDiT):
            name = type(network).__name__
            raise BadInput(f"stage2.backbone: expected a CausalDiT for the workflow causal, got {name}")
        self.network = network

    def window(self, frames_bschw: Tensor, t_bs: Tensor, condition: ActionCondition) -> Tensor:
        """Answers (B, S, C, h, w) for all frames of a window, each noised by its own level `t_bs` (B, S)."""
        led_bs, visible_bs = self._roles(condition)
        answer_bschw, _ = self.network(frames_bschw, t_bs, led_bs, visible_bs)
        if not self.residual:
            return answer_bschw
        added, before = [answer_bschw[:, 0]], answer_bschw[:, 0]
        for s in range(1, frames_bschw.shape[1]):
            clean_b111 = (t_bs[:, s - 1] == 0)[:, None, None, None]
            before = answer_bschw[:, s] + torch.where(clean_b111, frames_bschw[:, s - 1], before.detach())
            added.append(before)
        return torch.stack(added, dim=1)

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """The answer (B, C, h, w) for the last frame after clean ones, computed over the whole window."""
        context_bkchw = read_context(condition, self.context_shape).to(x_bchw)
        assert isinstance(condition, ActionCondition)
        frames_bschw = torch.cat((context_bkchw, x_bchw[:, None]), dim=1)
        clean_bk = t_b.new_zeros(len(t_b), self.context_shape[0])
        return self.window(frames_bschw, torch.cat((clean_bk, t_b[:, None]), dim=1), condition)[:, -1]

    def remember(self, condition: Condition | None) -> Memory:
        """Keys and values of the clean context, which all steps of a sampler share."""
        context_bkchw = read_context(condition, self.context_shape)
        assert isinstance(condition, ActionCondition)
        led_bs, visible_bs = self._roles(condition)
        clean_bk = context_bkchw.new_zeros(context_bkchw.shape[:2])
        return self.network(context_bkchw, clean_bk, led_bs[:, :-1], visible_bs[:, :-1])[1]

    def step(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None, memory: Memory) -> Tensor:
        """What `forward` gives, from the memory of the context and the last frame alone."""
        assert isinstance(condition, ActionCondition)
        assert condition.context is not None
        led_bs, visible_bs = self._roles(condition)
        answer, _ = self.network(x_bchw[:, None], t_b[:, None], led_bs[:, -1:], visible_bs[:, -1:], memory)
        return answer[:, 0] + condition.context[:, -1].to(x_bchw) if self.residual else answer[:, 0]

    def _roles(self, condition: ActionCondition) -> tuple[Tensor, Tensor]:
        """(B, S) the action that led to each frame, and (B, S) whether the frame is there."""
        actions_bk = torch.where(condition.mask, condition.actions, self.network.unknown)
        led_bs = torch.cat((torch.full_like(actions_bk[:, :1], self.network.unknown), actions_bk), dim=1)
        return led_bs, torch.cat((condition.mask, torch.ones_like(condition.mask[:, :1])), dim=1)


def of_one_frame(network: nn.Module) -> nn.Module:
    """The network, unless it is one of windows; BadInput then."""
    if isinstance(network, CausalDiT):
        raise BadInput("stage2.workflow: expected causal for a CausalDiT, got a workflow of single frames")
    return network


def given(codec: Codec | None) -> Codec:
    """The autoencoder, which `TwoStage` gives; BadInput where it did not."""
    if codec is None:
        raise BadInput("stage2: expected an autoencoder (make a TwoStage of it first), got none")
    return codec


class _Channels(nn.Module):
    """Frames (B, S, C, h, w) as channels (B, S C, h, w)."""

    def forward(self, frames_bschw: Tensor) -> Tensor:
        return frames_bschw.flatten(1, 2)


class _Time(nn.Module):
    """Frames (B, S, C, h, w) as a volume (B, C, S, h, w)."""

    def forward(self, frames_bschw: Tensor) -> Tensor:
        return frames_bschw.transpose(1, 2)


class _Last(nn.Module):
    """The last moment (B, C, h, w) of a volume (B, C, S, h, w)."""

    def forward(self, volume_bcshw: Tensor) -> Tensor:
        return volume_bcshw[:, :, -1]


def history_encoder(kind: HistoryEncoder, frames: int, channels: int, *, zero: bool = False) -> nn.Sequential:
    """(B, S, C, h, w) -> (B, C, h, w): convolution, GroupNorm, SiLU, convolution.

    GroupNorm, because batch statistics would mix noise levels, and fail at batch 1, which is how one plays.

    Args:
        kind: conv2d treats the frames as channels, conv3d convolves over time as well.
        frames: S.
        channels: C.
        zero: let the answer begin at zero.
    """
    hidden = max(8, frames * channels // 2)
    groups = next(g for g in (8, 4, 2, 1) if hidden % g == 0)
    norm = group_norm(hidden, groups)
    second: nn.Conv2d | nn.Conv3d
    layers: list[nn.Module]
    if kind == "conv2d":
        second = nn.Conv2d(hidden, channels, 3, padding=1)
        layers = [_Channels(), nn.Conv2d(frames * channels, hidden, 3, padding=1), norm, nn.SiLU(), second]
    else:
        second = nn.Conv3d(hidden, channels, (frames, 3, 3), padding=(0, 1, 1))
        layers = [_Time(), nn.Conv3d(channels, hidden, 3, padding=1), norm, nn.SiLU(), second, _Last()]
    if zero:
        for parameter in second.parameters():
            nn.init.zeros_(parameter)
    return nn.Sequential(*layers)


def read_context(condition: Condition | None, context_shape: tuple[int, ...]) -> Tensor:
    """(B, K, C, h, w) latents of the frames before.

    Raises:
        BadInput: not an `ActionCondition`, no context, or one of another shape.
    """
    context = condition.context if isinstance(condition, ActionCondition) else None
    if context is None:
        raise BadInput("condition.context: expected frames of history (data.dataset context: true), got None")
    if tuple(context.shape[1:]) != context_shape:
        raise BadInput(f"condition.context: expected (B, {str(context_shape)[1:]}, got {tuple(context.shape)}")
    return context
