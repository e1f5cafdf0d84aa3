"""Next-frame world models: diffusion of a game's next frame under the frames and actions before it.

Workflows: `latent_concat` stacks K clean context latents on the noisy target (DIAMOND, Alonso et al. 2024, section 3.1;
GameNGen, Valevski et al. 2024, section 3.2); `latent_history` first squeezes context and target through a convolution
to the channels of one latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from rqvae.diffusion.paths import Path, Prediction
from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.timesteps import TimestepLaw
from rqvae.errors import BadInput
from rqvae.models.interfaces import (
    ActionCondition,
    Condition,
    DataSpec,
    LabeledImageData,
    LatentShape,
    Stage1Encodings,
    Stage2ModelOutput,
)
from rqvae.models.layers.conv import group_norm
from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.randomness import Draw, normal, uniform

MakeBackbone = Callable[[LatentShape, DataSpec], nn.Module]
Workflow = Literal["latent_concat", "latent_history"]
HistoryEncoder = Literal["conv2d", "conv3d"]

# One step gives the mean of all futures, a ghost that is half there and the next frame drops; four steps choose.
FOUR_EULER_STEPS = Sampler(steps=4)


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
        self.network = backbone((channels, *latent_shape[1:]), data_spec)

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
        self.network = backbone(latent_shape, data_spec)

    def forward(self, x_bchw: Tensor, t_b: Tensor, condition: Condition | None) -> Tensor:
        """As `ConcatBackbone.forward`."""
        context_bkchw = read_context(condition, self.context_shape).to(x_bchw)
        frames_bkchw = torch.cat((context_bkchw, x_bchw[:, None]), dim=1)
        answer_bchw = self.network(self.history(frames_bkchw), t_b, condition)
        return answer_bchw + context_bkchw[:, -1] if self.residual else answer_bchw


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


def history_encoder(kind: HistoryEncoder, frames: int, channels: int) -> nn.Sequential:
    """(B, S, C, h, w) -> (B, C, h, w): convolution, GroupNorm, SiLU, convolution.

    GroupNorm, because batch statistics would mix noise levels, and fail at batch 1, which is how one plays.
    """
    hidden = max(8, frames * channels // 2)
    groups = next(g for g in (8, 4, 2, 1) if hidden % g == 0)
    norm = group_norm(hidden, groups)
    if kind == "conv2d":
        first, second = nn.Conv2d(frames * channels, hidden, 3, padding=1), nn.Conv2d(hidden, channels, 3, padding=1)
        return nn.Sequential(_Channels(), first, norm, nn.SiLU(), second)
    first3d = nn.Conv3d(channels, hidden, 3, padding=1)
    second3d = nn.Conv3d(hidden, channels, (frames, 3, 3), padding=(0, 1, 1))
    return nn.Sequential(_Time(), first3d, norm, nn.SiLU(), second3d, _Last())


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


class WorldModel(LatentDiffusion):
    """A diffusion model of the next frame.

    It predicts the clean frame (x0) by default: at equal budget 2 dB better than a velocity, and a decoder cannot emit
    the noise that a velocity holds.

    Args:
        latent_shape: (C, h, w) of one frame, given by Stage1 and the connector.
        data_spec: actions and history, given by the dataset.
        backbone: class of the network (`rqvae.models.stage2.linear_dit.LinearDiT`).
        workflow: latent_concat, or latent_history with a bottleneck of C channels.
        history_encoder: of latent_history.
        residual: the answer is added to the last frame's latent; only with prediction x0.
        context_noise: largest level of Gaussian noise on the context in training, so that generated frames are not a
            surprise; 0 is none.
        context_noise_share: share of the samples with such noise.
        path: see `LatentDiffusion`.
        prediction: x0, or v or velocity.
        timesteps: see `LatentDiffusion`.
        sampler: four Euler steps where it is not given.
        drop_condition: share of samples that see the null action; the context stays.

    Raises:
        BadInput: data without history frames and actions; a residual with another prediction than x0.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        backbone: MakeBackbone,
        workflow: Workflow = "latent_concat",
        history_encoder: HistoryEncoder = "conv2d",
        residual: bool = True,
        context_noise: float = 0.0,
        context_noise_share: float = 0.7,
        path: Path | None = None,
        prediction: Prediction = "x0",
        timesteps: TimestepLaw | None = None,
        sampler: Sampler = FOUR_EULER_STEPS,
        drop_condition: float = 0.1,
    ) -> None:
        if not data_spec.num_actions or not data_spec.history or not data_spec.context:
            raise BadInput(
                f"stage2: expected data with actions and frames of history (data.dataset context: true), got "
                f"num_actions {data_spec.num_actions}, history {data_spec.history}, context {data_spec.context}"
            )
        if residual and prediction != "x0":
            raise BadInput(f"stage2.residual: expected false for prediction {prediction} (it needs x0), got true")
        if not context_noise >= 0 or not 0 < context_noise_share <= 1:
            raise BadInput(
                f"stage2.context_noise, context_noise_share: expected >= 0 and in (0, 1], got {context_noise}, "
                f"{context_noise_share}"
            )

        def with_context(shape: LatentShape, spec: DataSpec) -> nn.Module:
            if workflow == "latent_concat":
                return ConcatBackbone(shape, spec, backbone, residual)
            return HistoryBackbone(shape, spec, backbone, history_encoder, residual)

        options = {"path": path, "timesteps": timesteps, "sampler": sampler, "drop_condition": drop_condition}
        super().__init__(latent_shape, data_spec, backbone=with_context, prediction=prediction, **options)  # type: ignore[arg-type]
        self.history = data_spec.history
        self.context_noise, self.context_noise_share = context_noise, context_noise_share

    def draws(self, latent_shape: LatentShape) -> dict[str, Draw]:
        """Those of `LatentDiffusion`, and where the context is noised `context_noise` (K, C, h, w) and its level ()."""
        numbers = super().draws(latent_shape)
        if self.context_noise:
            numbers["context_noise"] = Draw((self.history, *latent_shape), normal)
            numbers["context_level"] = Draw((), uniform)
        return numbers

    def forward(self, encodings: Stage1Encodings, inputs: LabeledImageData) -> Stage2ModelOutput:
        """See `LatentDiffusion.forward`; in training mode noise is added to the context first."""
        if self.training and self.context_noise:
            inputs = replace(inputs, condition=self._noised(inputs))
        return super().forward(encodings, inputs)

    def _noised(self, inputs: LabeledImageData) -> Condition:
        """The condition with `level` times noise on its context; the level is uniform up to `context_noise`."""
        condition = self._condition(inputs)
        assert isinstance(condition, ActionCondition)
        assert condition.context is not None
        drawn_b = self._draw(inputs, "context_level").to(condition.context)
        share = self.context_noise_share
        level_b = torch.where(drawn_b < share, self.context_noise * drawn_b / share, 0.0)
        noise = self._draw(inputs, "context_noise").to(condition.context)
        return replace(condition, context=condition.context + level_b[:, None, None, None, None] * noise)
