"""Whether a model can be sampled as a config says, found out on `meta` before anything starts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rqvae.models.two_stage import TwoStage
from rqvae.run import Stage2Run
from rqvae.trainers.dry_run import one_image


def check_vis_sampler(run: Stage2Run, two_stage: TwoStage) -> None:
    """That the model on `meta` can be sampled as `pictures.vis_sampler` says; found out here, not at the first picture.

    Raises:
        BadInput: a sampler that its prediction or its training does not allow.
    """
    if (sampler := run.pictures.vis_sampler) is None:
        return

    def no_step(denoise: object, x: Tensor, times: Tensor, noise: object) -> tuple[Tensor, int]:  # noqa: ARG001
        return x, 0

    with torch.device("meta"):
        batch = one_image(run.data.make("train")[0].spec, {}, run, two_stage.latent_shape)
        noise = torch.empty(1, *two_stage.latent_shape)
        two_stage.stage2.infer(batch, noise=noise, sampler=replace(sampler, solver=no_step))
