"""Next-frame world models: diffusion of a game's next frame under the frames and actions before it.

Workflows: `latent_concat` stacks K clean context latents on the noisy target (DIAMOND, Alonso et al. 2024, section 3.1;
GameNGen, Valevski et al. 2024, section 3.2); `latent_history` first squeezes context and target through a convolution
to the channels of one latent; `pixel` noises pixels, squeezes frames and noisy frame to 3 channels, and goes through
the frozen autoencoder in every evaluation; `causal` noises every frame of the window by a level of its own (Chen et al.
2024, diffusion forcing) and lets frames see earlier ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from rqvae.contracts import check_shape
from rqvae.diffusion.guidance import Predict
from rqvae.diffusion.paths import Path, Prediction
from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.timesteps import TimestepLaw
from rqvae.errors import BadInput
from rqvae.models.codec import Codec
from rqvae.models.interfaces import (
    ActionCondition,
    Condition,
    DataSpec,
    LabeledImageData,
    LatentShape,
    Stage1Encodings,
    Stage2Losses,
    Stage2ModelOutput,
)
from rqvae.models.stage2.diffusion import LatentDiffusion, at_least_fp32
from rqvae.models.stage2.world_backbones import (
    CausalBackbone,
    ConcatBackbone,
    HistoryBackbone,
    HistoryEncoder,
    HistoryVAEBackbone,
    MakeBackbone,
    given,
    read_context,
)
from rqvae.randomness import Draw, normal, uniform

Workflow = Literal["latent_concat", "latent_history", "pixel", "causal"]
LossSpace = Literal["latent", "pixel", "both"]

# One step gives the mean of all futures, a ghost that is half there and the next frame drops; four steps choose.
FOUR_EULER_STEPS = Sampler(steps=4)


class WorldModel(LatentDiffusion):
    """A diffusion model of the next frame.

    It predicts the clean frame (x0) by default: at equal budget 2 dB better than a velocity, and a decoder cannot emit
    the noise that a velocity holds.

    Where the data have windows with n > 1 targets (`GameFrames.rollout_steps`), it is unrolled as DIAMOND is for CS:GO
    (eloialonso/diamond, branch csgo, src/models/diffusion/denoiser.py): each target is noised and predicted with a loss
    of its own, and its predicted clean frame, without gradient, is context of the next. A negative result stands
    beside it: training on own *samples*, 0 to 6 generated context frames of 2 sampler steps each, kept ghosts alive
    (on screen after 64 frames in 92 % of dreams, 75 % before) but cost 7.6 dB of one step, 11 % of the open turns and
    two and a half times the player's error. Where the game is random the logged next frame is not the continuation of
    what the model itself dreamed, and such a target contradicts its context. The estimates here are of the logged
    frames, noise level by noise level, so they contradict less.

    Args:
        latent_shape: (C, h, w) of one frame, given by Stage1 and the connector.
        data_spec: actions and history, given by the dataset.
        backbone: class of the network (`rqvae.models.stage2.linear_dit.LinearDiT`, for causal
            `rqvae.models.stage2.causal_dit.CausalDiT`).
        workflow: latent_concat; latent_history with a bottleneck of C channels; pixel with one of 3 channels in front
            of the autoencoder, whose noise and samples are pixels; or causal, whose frames all have a level of their
            own, so that the context needs no other noise.
        history_encoder: of latent_history and pixel.
        loss_space: where the clean frame is compared: latent, pixel (decoded, in [-1, 1]) or both (their sum). In the
            workflow pixel another prediction than x0 is compared as pixels alone: its noise has no latent.
        residual: the answer is added to the last frame's latent; only with prediction x0.
        context_noise: largest level of Gaussian noise on the context in training, so that generated frames are not a
            surprise; 0 is none.
        context_noise_share: share of the samples with such noise; in the workflow causal of those whose context has
            levels of its own, while the others have a clean one, as one plays.
        path: see `LatentDiffusion`.
        prediction: x0, or v or velocity.
        timesteps: see `LatentDiffusion`.
        sampler: four Euler steps where it is not given.
        drop_condition: share of samples that see the null action; the context stays.

    Raises:
        BadInput: data without history frames and actions; a residual with another prediction than x0; a loss space
            that the workflow or the prediction does not have.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        backbone: MakeBackbone,
        workflow: Workflow = "latent_concat",
        history_encoder: HistoryEncoder = "conv2d",
        loss_space: LossSpace = "latent",
        residual: bool = True,
        context_noise: float = 0.0,
        context_noise_share: float = 0.7,
        path: Path | None = None,
        prediction: Prediction = "x0",
        timesteps: TimestepLaw | None = None,
        sampler: Sampler = FOUR_EULER_STEPS,
        drop_condition: float = 0.1,
    ) -> None:
        _check_data(data_spec)
        _check_prediction(prediction, residual, loss_space, workflow)
        if workflow == "causal":
            _check_causal(loss_space, context_noise, data_spec)
        if data_spec.rollout_steps > 1 and loss_space != "latent" and workflow != "pixel":
            raise BadInput(
                f"stage2.loss_space: expected latent for data.dataset rollout_steps {data_spec.rollout_steps} outside "
                f"the workflow pixel (only the last frame is there as an image), got {loss_space}"
            )
        if not context_noise >= 0 or not 0 < context_noise_share <= 1:
            raise BadInput(
                f"stage2.context_noise, context_noise_share: expected >= 0 and in (0, 1], got {context_noise}, "
                f"{context_noise_share}"
            )

        def with_context(shape: LatentShape, spec: DataSpec) -> nn.Module:
            if workflow == "causal":
                return CausalBackbone(shape, spec, backbone, residual)
            if workflow == "latent_concat":
                return ConcatBackbone(shape, spec, backbone, residual)
            through = HistoryVAEBackbone if workflow == "pixel" else HistoryBackbone
            return through(shape, spec, backbone, history_encoder, residual)

        options = {"path": path, "timesteps": timesteps, "sampler": sampler, "drop_condition": drop_condition}
        super().__init__(latent_shape, data_spec, backbone=with_context, prediction=prediction, **options)  # type: ignore[arg-type]
        self.history, self.workflow, self.loss_space = data_spec.history, workflow, loss_space
        self.needs_images = loss_space != "latent" or workflow == "pixel"
        self.in_pixels, self.rollout_steps = workflow == "pixel", data_spec.rollout_steps
        self.context_noise, self.context_noise_share = context_noise, context_noise_share
        self._codec: Codec | None = None

    def attach(self, codec: Codec) -> None:
        """The autoencoder, for the workflow pixel and for losses in pixels."""
        self._codec = codec
        if isinstance(self.backbone, HistoryVAEBackbone):
            self.backbone.codec = codec

    def draws(self, latent_shape: LatentShape) -> dict[str, Draw]:
        """Those of `LatentDiffusion`, and where the context is noised `context_noise` (K, C, h, w) and its level ().

        With n > 1 rollout steps `noise` is (n, C, h, w), `t` (n,), `context_noise` (K + n - 1, C, h, w); in the
        workflow causal there is `noise` and `t` for each of the K + 1 frames, and a `context_level`.
        """
        numbers, steps = super().draws(latent_shape), self.rollout_steps
        noised = self.history + 1 if self.workflow == "causal" else steps
        if noised > 1:
            numbers |= {"noise": Draw((noised, *latent_shape), normal), "t": Draw((noised,), self.timesteps)}
        if self.context_noise:
            numbers["context_noise"] = Draw((self.history + steps - 1, *latent_shape), normal)
        if self.context_noise or self.workflow == "causal":
            numbers["context_level"] = Draw((), uniform)
        return numbers

    def forward(self, encodings: Stage1Encodings, inputs: LabeledImageData) -> Stage2ModelOutput:
        """The prediction at x_t; in training mode noise is added to the context first.

        Args:
            encodings: clean targets (B, C, h, w); pixels in [-1, 1] in the workflow pixel.
            inputs: `draws` as `draws` says, the condition with its context in the same space, and `img` where the loss
                is in pixels.

        Returns:
            zs_pred (B, C, h, w), zs_degraded = x_t, `t` (B,) and what `compute_loss` compares: `target` (of zs_pred),
            and `pixels` with `pixel_target` (B, 3, H, W). With n > 1 rollout steps all of them have an axis n after
            the first, and `t` is `levels` (B, n). In the workflow causal that axis are the K frames that have one
            before them, and `weight` (B, K) says what each counts.

        Raises:
            BadInput: draws, a condition or an image that is not there.
        """
        x0 = encodings.zs.to(at_least_fp32(encodings.zs))
        noise, t = self._draw(inputs, "noise").to(x0), self._draw(inputs, "t").to(x0)
        condition = self._seen_condition(inputs)
        if isinstance(self.backbone, CausalBackbone):
            return self._forced(self.backbone, x0, noise, t, condition, inputs)
        if self.rollout_steps == 1:
            return self._predicted(x0, noise, t, self._noised(condition, inputs), inputs.img)
        return self._unrolled(x0, noise, t, condition, inputs)

    def _unrolled(
        self, x0: Tensor, noise: Tensor, t_bn: Tensor, condition: Condition | None, inputs: LabeledImageData
    ) -> Stage2ModelOutput:
        """The n targets one after the other; each estimate of a clean frame is context of those after it."""
        last = self.history + self.rollout_steps - 1
        frames = read_context(condition, (last, *x0.shape[1:])).to(x0)
        assert isinstance(condition, ActionCondition)
        steps: list[Stage2ModelOutput] = []
        for i in range(self.rollout_steps):
            at = self.history + i
            target = frames[:, at] if at < last else x0
            seen = slots(self._noised(replace(condition, context=frames), inputs), i, self.history)
            steps.append(self._predicted(target, noise[:, i], t_bn[:, i], seen, inputs.img))
            if at < last:
                frames = torch.cat((frames[:, :at], self._estimate(steps[-1])[:, None], frames[:, at + 1 :]), dim=1)
        return _together(steps)

    def _forced(
        self,
        backbone: CausalBackbone,
        x0: Tensor,
        noise: Tensor,
        t_bs: Tensor,
        condition: Condition | None,
        inputs: LabeledImageData,
    ) -> Stage2ModelOutput:
        """All frames of the window at levels of their own, but for the samples that have a clean context.

        Frames that are missing and clean ones are no targets: a sample's loss is the mean over the others.
        """
        if self.training:
            clean_b = self._draw(inputs, "context_level").to(t_bs) >= self.context_noise_share
            t_bs = torch.cat((torch.where(clean_b[:, None], 0.0, t_bs[:, :-1]), t_bs[:, -1:]), dim=1)
        context = read_context(condition, (self.history, *x0.shape[1:])).to(x0)
        assert isinstance(condition, ActionCondition)
        frames, count = torch.cat((context, x0[:, None]), dim=1).flatten(0, 1), noise.shape[:2]
        x_t = self.path.interpolate(noise.flatten(0, 1), frames, t_bs.flatten()).unflatten(0, count)
        target = self.path.target(self.prediction, noise.flatten(0, 1), frames, t_bs.flatten()).unflatten(0, count)
        answer = backbone.window(x_t, t_bs, condition)
        there_bs = torch.cat((condition.mask, torch.ones_like(condition.mask[:, :1])), dim=1)
        counted_bs = (there_bs & (t_bs > 0))[:, 1:].to(answer.dtype)
        weight_bs = counted_bs / counted_bs.sum(1, keepdim=True)
        parts = {"levels": t_bs[:, 1:], "target": target[:, 1:], "weight": weight_bs}
        return Stage2ModelOutput(zs_pred=answer[:, 1:], zs_degraded=x_t[:, 1:], additional_attr=parts)

    def _predict_under(self, condition: Condition | None) -> Predict:
        """In the workflow causal the context's keys and values are computed once and kept for all steps.

        Guidance asks under other conditions too, for which the whole window is computed.
        """
        backbone = self.backbone
        if not isinstance(backbone, CausalBackbone):
            return self._predict
        memory = backbone.remember(condition)

        def predict(x: Tensor, t: Tensor, asked: Condition | None) -> Tensor:
            if asked is not condition:
                return self._predict(x, t, asked)
            return backbone.step(x, t.to(x).expand(len(x)), asked, memory).to(x.dtype)

        return predict

    @torch.no_grad()
    def _estimate(self, output: Stage2ModelOutput) -> Tensor:
        """The clean frame (B, C, h, w) that a prediction says, in the space of what is noised."""
        parts, x_t = output.additional_attr or {}, output.zs_degraded
        assert x_t is not None
        if self.in_pixels and self.prediction == "x0":
            pixels = parts["pixels"] if "pixels" in parts else 2 * given(self._codec).decode(output.zs_pred) - 1
            return pixels.detach()
        return self.path.convert(output.zs_pred.detach(), x_t, parts["t"], self.prediction, "x0")

    @torch.no_grad()
    def infer(self, inputs: LabeledImageData, *, noise: Tensor, sampler: Sampler | None = None) -> Stage2ModelOutput:
        """See `LatentDiffusion.infer`; of a longer window the last K frames and actions are read."""
        condition = slots(self._condition(inputs), -self.history, self.history)
        return super().infer(replace(inputs, condition=condition), noise=noise, sampler=sampler)

    def _predicted(
        self, x0: Tensor, noise: Tensor, t_b: Tensor, condition: Condition | None, img: Tensor | None
    ) -> Stage2ModelOutput:
        """One target's prediction, and what it is compared with."""
        x_t, parts = self.path.interpolate(noise, x0, t_b), {"t": t_b}
        shown: Tensor | None = None
        if isinstance(self.backbone, HistoryVAEBackbone) and self.prediction == "x0":
            answer = clean = self.backbone.latent(x_t, t_b, condition)
            if self.loss_space != "pixel":
                parts["target"] = given(self._codec).encode((x0 + 1) / 2)
            shown = x0
        else:
            answer = self.backbone(x_t, t_b, condition)
            check_shape(answer, tuple(x_t.shape), f"stage2.backbone: {type(self.backbone).__name__}")
            if self.loss_space != "pixel" or self.in_pixels:
                parts["target"] = self.path.target(self.prediction, noise, x0, t_b)
            clean = self.path.convert(answer, x_t, t_b, self.prediction, "x0")
            if self.loss_space != "latent" and not self.in_pixels:
                shown = 2 * _there(img) - 1
        if self.loss_space != "latent" and shown is not None:
            parts |= {"pixels": 2 * given(self._codec).decode(clean) - 1, "pixel_target": shown}
        return Stage2ModelOutput(zs_pred=answer, zs_degraded=x_t, additional_attr=parts)

    def compute_loss(
        self,
        encodings: Stage1Encodings,  # noqa: ARG002  (the signature of every Stage2 model)
        output: Stage2ModelOutput,
        inputs: LabeledImageData,  # noqa: ARG002
    ) -> Stage2Losses:
        """Mean squared errors of a prediction of `forward`, in the spaces of `loss_space`: their sum."""
        parts = output.additional_attr or {}
        pairs: Sequence[tuple[Tensor, Tensor]] = [(output.zs_pred, parts["target"])] if "target" in parts else []
        if "pixels" in parts:
            pairs = [*pairs, (parts["pixels"], parts["pixel_target"])]
        if not pairs:
            raise BadInput("output.additional_attr: expected a target (as from forward), got none")
        squares = [(found.to(target.dtype) - target).square() for found, target in pairs]
        if "weight" in parts:
            errors = [(square.flatten(2).mean(2) * parts["weight"]).sum(1) for square in squares]
        else:
            errors = [square.flatten(1).mean(1) for square in squares]
        per_sample = torch.stack(errors).sum(0)
        return Stage2Losses(loss_total=per_sample.mean(), per_sample=per_sample.detach())

    def _noised(self, condition: Condition | None, inputs: LabeledImageData) -> Condition | None:
        """The condition; in training with noise on its context, of a level that is uniform up to `context_noise`."""
        if not (self.training and self.context_noise):
            return condition
        assert isinstance(condition, ActionCondition)
        assert condition.context is not None
        drawn_b = self._draw(inputs, "context_level").to(condition.context)
        share = self.context_noise_share
        level_b = torch.where(drawn_b < share, self.context_noise * drawn_b / share, 0.0)
        noise = self._draw(inputs, "context_noise").to(condition.context)
        return replace(condition, context=condition.context + level_b[:, None, None, None, None] * noise)


def _check_data(spec: DataSpec) -> None:
    if not spec.num_actions or not spec.history or not spec.context:
        raise BadInput(
            f"stage2: expected data with actions and frames of history (data.dataset context: true), got "
            f"num_actions {spec.num_actions}, history {spec.history}, context {spec.context}"
        )


def _check_prediction(prediction: Prediction, residual: bool, loss_space: LossSpace, workflow: Workflow) -> None:
    if residual and prediction != "x0":
        raise BadInput(f"stage2.residual: expected false for prediction {prediction} (it needs x0), got true")
    if workflow == "pixel" and prediction != "x0" and loss_space != "pixel":
        raise BadInput(
            f"stage2.loss_space: expected pixel for prediction {prediction} in the workflow pixel (noise has no "
            f"latent), got {loss_space}"
        )


def _check_causal(loss_space: LossSpace, context_noise: float, spec: DataSpec) -> None:
    """That nothing is asked for that the levels of the frames do already."""
    expected = {"stage2.loss_space": "latent", "stage2.context_noise": 0.0, "data.dataset.rollout_steps": 1}
    for (key, value), got in zip(expected.items(), (loss_space, context_noise, spec.rollout_steps), strict=True):
        if got != value:
            raise BadInput(
                f"{key}: expected {value} in the workflow causal (every frame is noised and a target), got {got}"
            )


def slots(condition: Condition | None, first: int, count: int) -> Condition | None:
    """`count` slots of an action condition from `first` on (negative: from the end); what has no slots as it is."""
    if not isinstance(condition, ActionCondition):
        return condition
    first = first if first >= 0 else max(0, condition.actions.shape[1] + first)
    part = slice(first, first + count)
    context = None if condition.context is None else condition.context[:, part]
    return replace(condition, context=context, actions=condition.actions[:, part], mask=condition.mask[:, part])


def _together(steps: Sequence[Stage2ModelOutput]) -> Stage2ModelOutput:
    """The outputs of rollout steps as one, step by step on a new second axis."""
    tables = [{**(s.additional_attr or {}), "zs_pred": s.zs_pred, "zs_degraded": s.zs_degraded} for s in steps]
    joined = {name: torch.stack([table[name] for table in tables], dim=1) for name in tables[0]}
    joined["levels"] = joined.pop("t")
    return Stage2ModelOutput(joined.pop("zs_pred"), joined.pop("zs_degraded"), joined)


def _there(img: Tensor | None) -> Tensor:
    if img is None:
        raise BadInput("img: expected images for stage2.loss_space pixel or both, got none (data.latents: null)")
    return img
