"""The operations of one optimizer step for one image, counted on `meta` before a run begins.

A forward and backward costs three forwards: backward multiplies once for the gradient of the input and once for that of
the weights (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Through a frozen module it costs two.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rqvae.callbacks.throughput import Work
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.models.codec import Codec
from rqvae.models.interfaces import Stage1Encodings, Stage1ModelOutput
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.models.losses.lpips import LPIPSLoss
from rqvae.randomness import kept
from rqvae.run import AnyRun, GanSettings, Stage1Run, Stage2Run
from rqvae.trainers.dry_run import assume_statistics, forward_cost, one_image
from rqvae.trainers.parts import float_type
from rqvae.trainers.stage2_trainer import make_two_stage

Module = TypeVar("Module", bound=nn.Module)


def step_work(run: AnyRun, gan_starts: int = 0) -> tuple[Work, ...]:
    """The operations of a step; takes nothing of the run's models but their shapes, and leaves no trace in them.

    Args:
        run: the experiment, with its models on any device.
        gan_starts: first optimizer step with an adversarial loss.

    Raises:
        RuntimeError: or any of its kind (NotImplementedError), from a model that cannot compute on `meta`.
    """
    with kept(), torch.device("meta"):
        return _stage1(run, gan_starts) if isinstance(run, Stage1Run) else _stage2(run)


def _stage1(run: Stage1Run, gan_starts: int) -> tuple[Work, ...]:
    spec, dtype = run.data.make("train")[0].spec, float_type(run.train.precision)
    stage1 = _on_meta(run.stage1).to(dtype).train()
    batch = one_image(spec, stage1.draws(spec.image_shape), run)
    images = batch.require_img()
    autoencoder = _flops(stage1, lambda: stage1(batch))
    # The adaptive weight asks for one more gradient of each of the two losses.
    extra = 1 if run.gan and run.gan.weighting != "fixed" else 0
    work = [Work(3 * autoencoder)]
    if run.lpips:
        distance = LPIPSLoss(net=run.lpips.net).outline().to(dtype)
        trunk = _flops(distance, lambda: distance(images, images)) / 2  # one forward of each of two images
        work += [Work(3 * trunk), Work(extra * trunk, gan_starts)]
    for loss in run.losses:
        once = _loss_flops(_on_meta(loss).to(dtype), stage1(batch), batch)
        work += [Work(2 * once), Work(extra * once, gan_starts)]
    if run.gan:
        discriminator = _on_meta(run.gan.discriminator).to(dtype).train()
        one = _flops(discriminator, lambda: discriminator(images))
        work.append(Work(_adversarial(run.gan, autoencoder, one, extra), gan_starts))
    return tuple(work)


def _loss_flops(loss: ImageLoss, output: Stage1ModelOutput, batch: LabeledImageData) -> float:
    return _flops(loss, lambda: loss(output, batch))


def _adversarial(gan: GanSettings, autoencoder: float, discriminator: float, extra: int) -> float:
    """What a GAN adds: the generator's loss, the discriminator on two images, and the second forward of the former."""
    return (2 + extra) * discriminator + 2 * 3 * discriminator + (0 if gan.reuse_forward else autoencoder)


def _stage2(run: Stage2Run) -> tuple[Work, ...]:
    connector = _on_meta(run.connector) if run.connector else None
    two_stage = make_two_stage(replace(run, stage1=_on_meta(run.stage1), connector=connector))
    two_stage.to(float_type(run.train.precision)).train()
    stage1, stage2, spec = two_stage.stage1, two_stage.stage2, run.data.make("train")[0].spec
    draws = {**stage1.draws(spec.image_shape), **stage2.draws(two_stage.latent_shape)}
    batch = one_image(spec, draws, run, two_stage.latent_shape)
    assume_statistics(two_stage)
    encoded = 0 if run.data.cache else 1 + (spec.history + spec.rollout_steps - 1 if spec.context else 0)
    encode = _flops(stage1, lambda: stage1.encode(batch)) if encoded else 0.0
    encodings = Stage1Encodings(torch.empty(1, *two_stage.latent_shape, dtype=float_type(run.train.precision)))
    inside = _CountedCodec(stage1, two_stage.connector)
    stage2.attach(inside)
    forward = _flops(stage2, lambda: stage2(encodings, batch))  # what goes through the codec is in it twice
    trained = forward - 2 * sum(once for once, _ in inside.done)
    before = 0.0 if stage2.in_pixels else encoded * encode
    return (Work(before), Work(3 * trained + sum(both for _, both in inside.done)))


@dataclass(frozen=True)
class _CountedCodec(Codec):
    """Notes the operations of each use: of the forward, and with the backward, which a frozen module has for its input.

    Each use is computed twice, once to be counted.
    """

    done: list[tuple[float, float]] = field(default_factory=list)

    def encode(self, images_bchw: Tensor) -> Tensor:
        self._note(images_bchw, lambda: Codec.encode(self, images_bchw))
        return Codec.encode(self, images_bchw)

    def decode(self, zs_bchw: Tensor) -> Tensor:
        self._note(zs_bchw, lambda: Codec.decode(self, zs_bchw))
        return Codec.decode(self, zs_bchw)

    def _note(self, x: Tensor, forward: Callable[[], Any]) -> None:
        once = _flops(self.stage1, forward)
        self.done.append((once, 2 * once if x.requires_grad else once))


def _flops(module: nn.Module, forward: Callable[[], Any]) -> float:
    return float(forward_cost(module, forward)[0])


def _on_meta(module: Module) -> Module:
    """A copy without memory: every parameter and buffer has its shape and type on `meta`."""
    memo: dict[int, Any] = {}
    for name_and_tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        tensor = name_and_tensor[1]
        outline = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(outline, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else outline
    return copy.deepcopy(module, memo)
