"""World models on the autoencoders of diffusers, in latents and through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData
from rqvae.models.interfaces import base_connector
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill
from tests.test_diffusers_vae import KINDS, saved

K, SIDE = 2, 32
SPEC = DataSpec((3, SIDE, SIDE), num_actions=5, history=K, context=True)


def network(shape: tuple[int, ...], spec: DataSpec) -> LinearDiT:
    return LinearDiT(shape, spec, depth=1, width=32, heads=2, cross_heads=2)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("workflow", ["latent_concat", "latent_history", "pixel"])
def test_a_step_and_a_frame(name: str, workflow: str, tmp_path: Path) -> None:
    """Everything learns but the autoencoder, and a frame of the right size is dreamed."""
    kind, wrapper, config, _ = KINDS[name]
    saved(tmp_path, kind, config)
    stage1 = wrapper(source=str(tmp_path)).requires_grad_(False).eval()
    torch.manual_seed(0)
    shape = stage1.latent_shape(SPEC.image_shape)
    world = WorldModel(shape, SPEC, backbone=network, workflow=workflow)  # type: ignore[arg-type]
    for parameter in world.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = TwoStage(stage1, base_connector(), world, SPEC.image_shape)
    numbers = {**stage1.draws(SPEC.image_shape), **world.draws(model.latent_shape)}
    rows = [fill(numbers, 0, i) for i in range(2)]
    draws = {key: torch.stack([row[key] for row in rows]) for key in numbers}
    seen = torch.ones(2, K, dtype=torch.bool)
    condition = ActionCondition(torch.rand(2, K, 3, SIDE, SIDE), torch.randint(5, (2, K)), seen, 5)
    losses, _ = model.training_loss(LabeledImageData(torch.rand(2, 3, SIDE, SIDE), condition, draws=draws))
    losses.loss_total.backward()
    assert torch.isfinite(losses.loss_total)
    dead = [key for key, p in world.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [key for key in dead if "null" not in key], dead
    assert not any(p.grad is not None for p in stage1.parameters())
    frame = model.decode(model.sample(condition, draws["noise"]))
    assert frame.shape == (2, 3, SIDE, SIDE)
    assert torch.isfinite(frame).all()
