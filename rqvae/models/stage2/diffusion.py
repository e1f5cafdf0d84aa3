"""A diffusion model of latents, composed of a backbone, a path, a prediction, a law of times and a sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rqvae.contracts import check_shape
from rqvae.diffusion.denoiser import Denoiser
from rqvae.diffusion.guidance import Predict
from rqvae.diffusion.noise import KeyedNoise
from rqvae.diffusion.paths import LinearFlow, Path, Prediction
from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.timesteps import TimestepLaw, Uniform
from rqvae.diffusion.weighting import Weighting
from rqvae.errors import BadInput
from rqvae.models.interfaces import (
    Condition,
    DataSpec,
    LabeledImageData,
    LatentShape,
    Stage1Encodings,
    Stage2Losses,
    Stage2Model,
    Stage2ModelOutput,
)
from rqvae.models.layers.mask_embedding import checked_mask, soft_one_hot
from rqvae.randomness import Draw, normal, uniform

# A frozen value, not a factory: the keys of the sampler are then plain keys of the config, each with its own errors.
FIFTY_EULER_STEPS = Sampler()


class LatentDiffusion(Stage2Model):
    """Predicts on a path between latent and noise with a mean squared error; generates by solving the path's ODE.

    With the defaults this is rectified flow: x_t = (1 - t) x0 + t noise, and the network answers noise - x0
    (Liu et al. 2022, eq. 1).

    Args:
        latent_shape: (C, h, w), given by Stage1 and the connector.
        data_spec: what the conditions are, given by the dataset.
        backbone: class of the network, `(x (B, C, h, w), t (B,), condition) -> (B, C, h, w)`; made with
            `latent_shape` and `data_spec`.
        path: from data to noise (`rqvae.diffusion.vp.VP`); null is `LinearFlow`.
        prediction: what the network answers: velocity, x0 (data), eps (noise) or v = alpha eps - sigma x0.
        timesteps: law of the training times; null is `Uniform`.
        sampler: solver, steps, spacing and guidance; 50 Euler steps without guidance where it is not given.
        drop_condition: share of training samples that see the null condition, in [0, 1]; without effect where the
            data have no condition, and 0 where the dataset drops them itself (`p_cond` of masks).
        weighting: of the squared error by time (`rqvae.diffusion.weighting.P2`); null weighs all alike.
        class_weighted_loss: for masks: what the squared error counts where the mask has each of its classes; without a
            label it counts 1. Null is 1 everywhere.

    Raises:
        BadInput: a share outside [0, 1], or one above 0 where the dataset drops conditions; a sampler that the
            prediction or the share does not allow; weights that are not one >= 0 a class of masks.
    """

    def __init__(
        self,
        latent_shape: LatentShape,
        data_spec: DataSpec,
        *,
        backbone: Callable[[LatentShape, DataSpec], nn.Module],
        path: Path | None = None,
        prediction: Prediction = "velocity",
        timesteps: TimestepLaw | None = None,
        sampler: Sampler = FIFTY_EULER_STEPS,
        drop_condition: float = 0.1,
        weighting: Weighting | None = None,
        class_weighted_loss: list[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= drop_condition <= 1:
            raise BadInput(f"stage2.drop_condition: expected a number in [0, 1], got {drop_condition}")
        self.path, self.prediction = path or LinearFlow(), prediction
        if data_spec.drops_condition and drop_condition > 0:
            raise BadInput(
                "stage2.drop_condition: expected 0, as the dataset drops conditions (p_cond) and one place does, got "
                f"{drop_condition}"
            )
        self.timesteps, self.drop_condition = timesteps or Uniform(), drop_condition
        self.weighting, self.knows_null = weighting, data_spec.drops_condition or drop_condition > 0
        self.class_weights = _checked_weights(class_weighted_loss, data_spec.num_mask_classes)
        self.layout_classes = data_spec.num_mask_classes
        self.conditional = bool(data_spec.num_classes or data_spec.num_actions or data_spec.num_mask_classes)
        self._check(sampler)
        self.sampler = sampler
        self.backbone = backbone(latent_shape, data_spec)

    def draws(self, latent_shape: LatentShape) -> dict[str, Draw]:
        """`noise` (C, h, w), `t` (), and `drop` () where conditions are dropped."""
        numbers = {"noise": Draw(tuple(latent_shape), normal), "t": Draw((), self.timesteps)}
        return numbers | ({"drop": Draw((), uniform)} if self._drops else {})

    def forward(self, encodings: Stage1Encodings, inputs: LabeledImageData) -> Stage2ModelOutput:
        """The prediction at x_t.

        In training mode the condition of a sample is replaced by null where its `drop` is below `drop_condition`: the
        only place where conditions are dropped.

        Args:
            encodings: clean latents (B, C, h, w).
            inputs: `draws` (`noise`, `t`, `drop`, see `draws`) and the condition.

        Returns:
            zs_pred (B, C, h, w), zs_degraded = x_t, and `t` (B,) and `target` (B, C, h, w).

        Raises:
            BadInput: draws or a condition that are not there.
        """
        x0 = encodings.zs.to(at_least_fp32(encodings.zs))
        noise, t_b = self._draw(inputs, "noise").to(x0), self._draw(inputs, "t").to(x0)
        condition = self._seen_condition(inputs)
        x_t = self.path.interpolate(noise, x0, t_b)
        target = self.path.target(self.prediction, noise, x0, t_b)
        prediction = self.backbone(x_t, t_b, condition)
        check_shape(prediction, tuple(x_t.shape), f"stage2.backbone: {type(self.backbone).__name__}")
        return Stage2ModelOutput(zs_pred=prediction, zs_degraded=x_t, additional_attr={"t": t_b, "target": target})

    def compute_loss(
        self,
        encodings: Stage1Encodings,  # noqa: ARG002  (the signature of every Stage2 model)
        output: Stage2ModelOutput,
        inputs: LabeledImageData,
    ) -> Stage2Losses:
        """Weighted mean squared error of a prediction of `forward`: the mean, and of each sample (B,)."""
        if output.additional_attr is None or "target" not in output.additional_attr:
            raise BadInput("output.additional_attr: expected a target (as from forward), got none")
        target = output.additional_attr["target"]
        errors = (output.zs_pred.to(target.dtype) - target).square()
        if self.class_weights is not None:
            errors = errors * self._class_weight_map(inputs, errors)
        per_sample = errors.flatten(1).mean(1)
        if self.weighting is not None:
            per_sample = per_sample * self.weighting(self.path, output.additional_attr["t"])
        return Stage2Losses(loss_total=per_sample.mean(), per_sample=per_sample.detach())

    def _class_weight_map(self, inputs: LabeledImageData, like: Tensor) -> Tensor:
        """(B, 1, h, w): the weights of the classes, by their shares at each latent position."""
        assert self.class_weights is not None
        mask_bhw, classes = checked_mask(inputs.condition, len(self.class_weights)), len(self.class_weights)
        shares = soft_one_hot(mask_bhw, classes, (like.shape[2], like.shape[3]), like.dtype)
        # one number at a time: a tensor made here would be copied to the device in every step
        weighted = [weight * shares[:, k : k + 1] for k, weight in enumerate((*self.class_weights, 1.0))]
        return torch.stack(weighted).sum(0)

    @torch.no_grad()
    def infer(self, inputs: LabeledImageData, *, noise: Tensor, sampler: Sampler | None = None) -> Stage2ModelOutput:
        """Generate latents.

        Stochastic solvers get noise that is a function of each sample's `noise`, so a sample does not depend on its
        batch.

        Args:
            inputs: only `condition` is read; None exactly where the data have none.
            noise: (B, C, h, w); its precision, at least fp32, is that of the sampling.
            sampler: in place of the model's own.

        Returns:
            zs_pred (B, C, h, w), and `nfe`: how often the (guided) prediction was evaluated.

        Raises:
            BadInput: no condition where there must be one; a sampler that does not fit.
        """
        if sampler is not None:
            self._check(sampler)
        noise = noise.to(at_least_fp32(noise))
        condition = self._condition(inputs)
        zs, nfe = (sampler or self.sampler)(
            self._predict_under(condition),
            noise,
            condition,
            KeyedNoise(noise),
            path=self.path,
            prediction=self.prediction,
        )
        return Stage2ModelOutput(zs_pred=zs, additional_attr={"nfe": nfe})

    def predictor(self, prediction: Prediction) -> Predict:
        """This model as the guide of another (`Autoguidance`): `(x, t, condition) -> prediction` of the kind named.

        Without gradients; put the model into eval mode first.
        """

        @torch.no_grad()
        def predict(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
            answer = Denoiser(lambda x, t: self._predict(x, t, condition), self.path, self.prediction)
            return answer.at(x, t, prediction)[0]

        return predict

    def denoiser(self, condition: Condition | None) -> Denoiser:
        """The sampler's guided prediction under a condition of length B, for a solver of one's own; no gradients."""
        guidance = self.sampler.guidance

        @torch.no_grad()
        def guided(x: Tensor, t: Tensor) -> Tensor:
            return self._predict(x, t, condition) if guidance is None else guidance(self._predict, x, t, condition)

        return Denoiser(guided, self.path, self.prediction)

    def _predict_under(self, condition: Condition | None) -> Predict:  # noqa: ARG002
        """What a sampler asks while it makes one batch under this condition; work may be shared between its steps."""
        return self._predict

    def _predict(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """The network's answer (B, C, h, w) at one time `t` () for the whole batch."""
        return self.backbone(x, t.to(x).expand(len(x)), condition).to(x.dtype)

    @property
    def _drops(self) -> bool:
        return self.conditional and self.drop_condition > 0

    def _condition(self, inputs: LabeledImageData) -> Condition | None:
        """The batch's condition, which is there exactly where the data have one."""
        if self.conditional and inputs.condition is None:
            raise BadInput(
                "condition: expected one (the model is conditional; condition.null() is the null one), got None"
            )
        return inputs.condition

    def _seen_condition(self, inputs: LabeledImageData) -> Condition | None:
        """The batch's condition; in training null for the samples whose `drop` says so."""
        condition = self._condition(inputs)
        if self.training and self._drops and condition is not None:
            return condition.dropped(self._draw(inputs, "drop") < self.drop_condition)
        return condition

    def _draw(self, inputs: LabeledImageData, name: str) -> Tensor:
        """The batch's random numbers of one name."""
        if inputs.draws is None or name not in inputs.draws:
            raise BadInput(f"draws.{name}: expected numbers in the batch, got {sorted(inputs.draws or {})}")
        return inputs.draws[name]

    def _check(self, sampler: Sampler) -> None:
        """That the prediction gives a velocity wherever the sampler asks, and that null was trained if it is used."""
        asked = sampler.times()[:-1]
        if self.prediction != "velocity" and bool((self.path.determinant(self.prediction, asked) == 0).any()):
            raise BadInput(
                f"sampler.start: expected < 1, for example 0.999, as {self.prediction} on {type(self.path).__name__} "
                f"gives no velocity at {sampler.start:g}"
            )
        if sampler.guidance is not None and sampler.guidance.needs_null and not (self.conditional and self.knows_null):
            raise BadInput(
                "sampler.guidance: expected a model trained with the null condition (conditional data and "
                f"drop_condition > 0), got drop_condition {self.drop_condition:g}"
            )


def _checked_weights(weights: list[float] | None, classes: int) -> tuple[float, ...] | None:
    """The weights of the mask's classes."""
    if weights is None:
        return None
    if not classes or len(weights) != classes or min(weights) < 0:
        raise BadInput(f"stage2.class_weighted_loss: expected {classes} numbers >= 0 (mask classes), got {weights}")
    return tuple(weights)


def at_least_fp32(x: Tensor) -> torch.dtype:
    """fp32 for the bf16 latents of an autocast encoder, whose 8 bits are too few for times; else x's own."""
    return torch.promote_types(x.dtype, torch.float32)
