"""Eight windows are learned by heart in every workflow: the whole way of a batch works, frames, actions and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rqvae.games.collect import collect
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, LabeledImageDatasetWrapper
from rqvae.img_datasets.transforms import Identity
from rqvae.models.interfaces import base_connector
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage2.causal_dit import CausalDiT
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill

WORKFLOWS = {  # the options, and after how many steps
    "latent_concat": ({}, 150),
    "latent_history": ({}, 200),
    "pixel": ({"loss_space": "both"}, 120),
    # where the context is noise too no window can be told from another: with the default of 0.7 the floor is 6 %
    "causal": ({"context_noise_share": 0.2}, 700),
    "causal, no residual": ({"workflow": "causal", "residual": False}, 300),
    "pixel, an autoencoder, loss in latents": ({"workflow": "pixel", "loss_space": "latent"}, 200),
    "latent_concat, 2 rollout steps": ({"workflow": "latent_concat"}, 200),
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    collect("maze-chase", 400, 32, folder)
    return folder


def network(shape: tuple[int, ...], spec: DataSpec) -> torch.nn.Module:
    return LinearDiT(shape, spec, depth=1, width=48, heads=2, cross_heads=2)


def windows_of_frames(shape: tuple[int, ...], spec: DataSpec) -> torch.nn.Module:
    return CausalDiT(shape, spec, depth=1, width=64, heads=2, temporal_heads=2)


def autoencoder() -> KLVAE:
    """A small one of random weights, frozen: its latents are its own, and its gradient is what is learned through."""
    return KLVAE(latent_channels=4, width=16, multipliers=[1, 2, 2], blocks=1, norm_groups=8).requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKFLOWS)
def test_eight_windows_are_learned(recording: Path, name: str) -> None:
    """Below 5 % of the first loss, over new noise and times in each step."""
    changed, count = WORKFLOWS[name]
    options = {"workflow": name, **changed}
    steps = 2 if "rollout" in name else 1
    data = GameFrames(
        "train", root=str(recording), size=32, history=2, context=True, padding=False, rollout_steps=steps
    )
    data.open()
    torch.manual_seed(0)
    backbone = windows_of_frames if options["workflow"] == "causal" else network
    stage1 = autoencoder() if "autoencoder" in name else PixelStage1(4)
    shape = stage1.latent_shape(data.spec.image_shape)
    world = WorldModel(shape, data.spec, backbone=backbone, drop_condition=0.0, **options)
    model = TwoStage(stage1, base_connector(), world, data.spec.image_shape).train()
    stream = LabeledImageDatasetWrapper(data, Identity(data.spec), world.draws(model.latent_shape), 0, shuffle=False)
    eight = stream.collate_fn([stream[10 * i] for i in range(8)])
    optimizer, losses = torch.optim.AdamW(world.parameters(), lr=8e-3, weight_decay=0.0), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=count, pct_start=0.1)
    for step in range(count):
        loss = model.training_loss(with_draws(eight, model, step))[0].loss_total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.05 * losses[0], (losses[0], sum(losses[-20:]) / 20)


def with_draws(batch: LabeledImageData, model: TwoStage, step: int) -> LabeledImageData:
    """The same windows under new noise."""
    numbers = [fill(model.stage2.draws(model.latent_shape), step, i) for i in range(8)]
    draws = {name: torch.stack([row[name] for row in numbers]) for name in numbers[0]}
    return LabeledImageData(batch.img, batch.condition, draws=draws)
