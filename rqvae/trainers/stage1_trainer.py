"""Training of an autoencoder: reconstruction, latent, perceptual and adversarial losses.

One step is: forward, compute_loss, `loss_total + lpips_weight * loss_lpips + gan_weight * loss_gan` and `weight *
loss_NAME` of each of the config's own losses, update; a second forward without gradient on the same batch,
discriminator update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rqvae.backends import Backend, LossScaler
from rqvae.callbacks.channels.dynamics import ChannelDynamics, check_settings
from rqvae.callbacks.final_model import FinalModel, check_has_form
from rqvae.callbacks.interfaces import Intervention, Observer, Stateful
from rqvae.contracts import check_shape, check_type
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.interfaces import Stage1Losses, Stage1Model, Stage1ModelOutput
from rqvae.models.losses.adaptive import last_layer_weight, reconstruction_weight
from rqvae.models.losses.gan import discriminator_loss, generator_loss
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.models.losses.lpips import LPIPSLoss
from rqvae.run import GanSettings, Stage1Run
from rqvae.trainers.clock import Clock
from rqvae.trainers.evaluation_trainer import SplitWalk, reconstruction_grid
from rqvae.trainers.initial_weights import load_initial
from rqvae.trainers.online_images import Reconstructions
from rqvae.trainers.online_scores import prepare
from rqvae.trainers.parallel import wrap
from rqvae.trainers.parts import Parts, compile_planned, float_type, make_ema, on_main, prepare_blocks
from rqvae.trainers.updates import StepLosses, Update, adamw_of


@dataclass
class Stage1Objective:
    """What the autoencoder and the discriminator minimise.

    Args:
        backend: for the mean of gradients over ranks.
        stage1: the bare autoencoder.
        wrapped_stage1: the one whose backward averages gradients.
        lpips: perceptual loss, loaded, or None.
        lpips_weight: of it in the total.
        gan: adversarial loss, or None.
        wrapped_discriminator: the one whose backward averages gradients.
        gan_starts: first step with an adversarial loss.
        clock: time.
        losses: the config's own, frozen, on the device.
        scaler: of the autoencoder's loss, in fp16.
    """

    backend: Backend
    stage1: Stage1Model
    wrapped_stage1: nn.Module
    lpips: LPIPSLoss | None
    lpips_weight: float
    gan: GanSettings | None
    wrapped_discriminator: nn.Module | None
    gan_starts: int
    clock: Clock
    losses: Sequence[ImageLoss] = ()
    scaler: LossScaler | None = None
    _recons: dict[int, Tensor] = field(default_factory=dict, init=False)

    def autoencoder_loss(self, batch: LabeledImageData, micro: int) -> StepLosses:
        """Total loss of the autoencoder on micro-batch number `micro` of the step."""
        output, images = self.wrapped_stage1(batch), batch.require_img()
        check_type(output, Stage1ModelOutput, "stage1: forward")
        check_shape(output.xs_recon, tuple(images.shape), "stage1: forward: xs_recon")
        losses = self.stage1.compute_loss(output, batch)
        check_type(losses, Stage1Losses, "stage1: compute_loss")
        total = shown = losses.loss_total
        recon = losses.loss_recon
        parts = {"loss_recon": losses.loss_recon, "loss_latent": losses.loss_latent}
        if self.lpips:
            parts["loss_lpips"] = self.lpips(output.xs_recon, images)
            total = total + self.lpips_weight * parts["loss_lpips"]
            recon = recon + self.lpips_weight * parts["loss_lpips"]
        for loss in self.losses:
            parts[f"loss_{loss.name}"] = term = self._own_loss(loss, output, batch)
            total, recon = total + loss.weight * term, recon + loss.weight * term
        if self.gan and self.clock.step >= self.gan_starts:
            parts["loss_gan"] = generator_loss(self.gan.loss, self.gan.discriminator(output.xs_recon))
            weight = self.gan.weight * self._adaptive_factor(recon, parts["loss_gan"], output.xs_recon)
            parts["gan_weight"] = self._unless_skipped(weight)
            shown = total + parts["gan_weight"] * parts["loss_gan"]
            total = total + weight * parts["loss_gan"]
            if self.gan.reuse_forward:
                self._recons[micro] = output.xs_recon.detach()
        else:
            shown = total
        return StepLosses(total, {"loss_total": shown, **parts})

    def _own_loss(self, loss: ImageLoss, output: Stage1ModelOutput, batch: LabeledImageData) -> Tensor:
        """A loss of the config's; without a gradient it would be logged and change nothing."""
        term = loss(output, batch)
        check_shape(term, (), f"losses: {type(loss).__name__}")
        if torch.is_grad_enabled() and not term.requires_grad:
            raise BadInput(f"losses: {type(loss).__name__}: expected a gradient to the model's output, got none")
        return term

    def _adaptive_factor(self, recon: Tensor, adversarial: Tensor, xs_recon: Tensor) -> Tensor:
        assert self.gan is not None
        scale = self.scaler.value if self.scaler else None
        if self.gan.weighting == "last_layer":
            return last_layer_weight(recon, adversarial, self.stage1.get_last_layer(), self._mean, scale)
        if self.gan.weighting == "reconstruction":
            return reconstruction_weight(recon, adversarial, xs_recon, self._mean, scale)
        return torch.ones_like(recon)

    def _unless_skipped(self, weight: Tensor) -> Tensor:
        """The weight for the log: 0 where its fp16 gradients overflowed, a fault only once the scale is below 1.

        The total keeps the NaN, for which the scaler skips the step.
        """
        if self.scaler is None:
            return weight
        return torch.where(weight.isfinite() | (self.scaler.value < 1), weight, 0.0)

    def _mean(self, x: Tensor) -> Tensor:
        return self.backend.all_reduce(x, "mean")

    def discriminator_loss(self, batch: LabeledImageData, micro: int) -> StepLosses:
        """Loss of the discriminator on the images that the autoencoder has just learnt from."""
        assert self.gan is not None
        assert self.wrapped_discriminator is not None
        images = batch.require_img()
        if self.gan.reuse_forward:
            recon = self._recons.pop(micro)
        else:
            with torch.no_grad():
                recon = self.stage1(batch).xs_recon
        # one call of the wrapped module, so that its gradient hooks fire once
        real, fake = self.wrapped_discriminator(torch.cat([images, recon])).chunk(2)
        loss = discriminator_loss(self.gan.loss, real, fake)
        return StepLosses(loss, {"loss_disc": loss, "logits_real": real.mean(), "logits_fake": fake.mean()})


def build(run: Stage1Run, backend: Backend, clock: Clock) -> Parts:
    """Models, updates, pictures and scores of a Stage1 run, on this rank's device."""
    image_shape = run.data.make("train")[0].spec.image_shape
    run.stage1.latent_shape(image_shape)
    dtype = float_type(run.train.precision)
    load_initial({"stage1": run.stage1}, run.train.initial_weights)
    stage1 = run.stage1.to(backend.device, dtype).train()
    lpips = None
    if run.lpips:
        lpips = LPIPSLoss(net=run.lpips.net, trunk_weights=run.lpips.trunk_weights)
        on_main(backend, lpips.fetch)
        lpips = lpips.load().to(backend.device, dtype)
    if run.train.channels_last:
        for module in (stage1, *([run.gan.discriminator] if run.gan else [])):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepare_blocks(stage1, run.train, backend)
    compile_planned(stage1, run.train.compile_plan, backend)
    wrapped = wrap(stage1, run.train, backend)
    modules: dict[str, nn.Module] = {"stage1": stage1}
    starts, wrapped_discriminator = 0, None
    if run.gan:
        modules["discriminator"] = run.gan.discriminator.to(backend.device, dtype).train()
        wrapped_discriminator = wrap(modules["discriminator"], run.train, backend)
        starts = clock.starting_at(run.gan.disc_start)
    weight = run.lpips.weight if run.lpips else 0.0
    scaler = backend.loss_scaler()
    own = [loss.to(backend.device, dtype).requires_grad_(False).eval() for loss in run.losses]
    objective = Stage1Objective(
        backend, stage1, wrapped, lpips, weight, run.gan, wrapped_discriminator, starts, clock, own, scaler
    )
    loss, settings = objective.autoencoder_loss, run.updates.autoencoder
    make = adamw_of(backend)
    updates = [Update("autoencoder", stage1, wrapped, loss, settings, make_optimizer=make, scaler=scaler)]
    if wrapped_discriminator is not None:
        loss, settings = objective.discriminator_loss, run.updates.discriminator
        module = modules["discriminator"]
        wrapped = wrapped_discriminator
        own_scaler = backend.loss_scaler()
        updates.append(Update("discriminator", module, wrapped, loss, settings, starts, make, own_scaler))
    companions, extras = _companions(run, stage1, backend)
    val, ema = SplitWalk(run.data, "val", backend, dtype), make_ema(stage1, run.ema)
    parts = Parts(
        modules=modules,
        updates=updates,
        ema=ema,
        draws=stage1.draws(image_shape),
        counted=modules,
        picture=("reconstructions", lambda: reconstruction_grid(stage1, val, run.pictures.images)),
        evaluate=prepare(run, backend, lambda walk: Reconstructions(stage1, walk, run.online_eval.images), ema),
        facts={"stage": 1, "model": type(stage1).__qualname__},
        companions=companions,
        extras=extras,
    )
    if run.checkpoint.final_model:
        parts.companions = [*companions, FinalModel(stage1, parts.evaluated)]
    return parts


def _companions(
    run: Stage1Run, stage1: Stage1Model, backend: Backend
) -> tuple[list[Observer | Intervention], dict[str, Stateful]]:
    """Channel tracking, where it is asked for, and its state."""
    check_settings(stage1, run.tracking, run.intervention)
    if not run.tracking.enabled:
        return [], {}
    dynamics = ChannelDynamics(stage1, run.tracking, run.intervention, backend, run.train.seed)
    return [dynamics], {"channels": dynamics}


def check_companions(run: Stage1Run) -> None:
    """That the layers to track are there, and that the final model has a form in diffusers."""
    check_settings(run.stage1, run.tracking, run.intervention)
    if run.checkpoint.final_model:
        check_has_form(run.stage1)
