"""Connectors against float64 statistics, and the two-stage model against an autoencoder of two lines."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rqvae.diffusion import Sampler, heun
from rqvae.errors import BadInput
from rqvae.models.connectors import ChannelStatistics, ReshapeConnector, ScaleShift, base_connector, channel_statistics
from rqvae.models.interfaces import (
    DataSpec,
    LabeledImageData,
    Stage1Encodings,
    Stage1Model,
    Stage1ModelOutput,
    Stage2ModelOutput,
)
from rqvae.models.stage2 import LatentDiffusion
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill, generator
from tests.test_stage2 import ACTIONS, F64, actions, randomised, small_dit

# Connectors


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 15, 4)])
def test_scale_shift_normalises_and_returns(shape: tuple[int, ...]) -> None:
    axis = 1 if len(shape) == 4 else 2
    scale = torch.tensor([0.1, 1, 5, 100], dtype=F64).view([4 if i == axis else 1 for i in range(len(shape))])
    zs = torch.randn(shape, dtype=F64, generator=generator(0)) * scale + 3 * scale
    connector = ScaleShift().double()
    assert connector.latent_shape(shape[1:]) == shape[1:]
    connector.set_statistics(*channel_statistics([zs])[1:])
    normal = connector(Stage1Encodings(zs, {"mu": zs}))
    rest = [i for i in range(len(shape)) if i != axis]
    torch.testing.assert_close(normal.zs.mean(rest), torch.zeros(4, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(normal.zs.var(rest, unbiased=False), torch.ones(4, dtype=F64), rtol=1e-6, atol=0)
    assert normal.additional_attr is not None
    for back in (connector.reverse(normal), connector.reverse(Stage2ModelOutput(zs_pred=normal.zs))):
        torch.testing.assert_close(back.zs, zs, rtol=1e-12, atol=1e-12)


def test_reshape_is_row_major_and_returns() -> None:
    tokens = torch.arange(2 * 6 * 4, dtype=F64).view(2, 6, 4)
    connector = ReshapeConnector(2, 3)
    grid = connector(Stage1Encodings(tokens)).zs
    assert connector.latent_shape((6, 4)) == (4, 2, 3) == tuple(grid.shape[1:])
    for row, column in ((0, 2), (1, 0), (1, 2)):
        assert torch.equal(grid[:, :, row, column], tokens[:, row * 3 + column])
    assert torch.equal(connector.reverse(Stage2ModelOutput(zs_pred=grid)).zs, tokens)
    for bad in (torch.zeros(1, 5, 4), torch.zeros(1, 4, 2, 3)):
        with pytest.raises(BadInput, match=r"connector: expected tokens \(L, C\) with L = 2 x 3 = 6, got"):
            connector(Stage1Encodings(bad))
    with pytest.raises(BadInput, match=r"expected a latent \(B, C, 2, 3\), got \(1, 4, 3, 2\)"):
        connector.reverse(Stage1Encodings(torch.zeros(1, 4, 3, 2)))


class LockStep:
    """A sum over threads that each play one rank."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.sent = threading.Barrier(ranks), {}

    def __call__(self, x: Tensor) -> Tensor:
        self.barrier.wait(10)
        self.sent[threading.get_ident()] = x
        self.barrier.wait(10)
        return torch.stack(list(self.sent.values())).sum(0)


def test_statistics_survive_an_offset_padding_and_ranks() -> None:
    """fp64 sums of squares would lose a spread of 1e-3 on an offset of 1e6; three ranks give what one gives."""
    zs = torch.randn(30, 2, 4, 4, dtype=F64, generator=generator(0)) * 1e-3
    zs[:, 1] += 1e6
    expected_mean, expected_std = zs.mean((0, 2, 3)), zs.var((0, 2, 3), unbiased=False).sqrt()
    ranks = [ChannelStatistics() for _ in range(3)]
    for rank, statistics in enumerate(ranks):
        for batch in zs[rank::3].split(4):
            padded = torch.cat((batch, torch.full((4 - len(batch), 2, 4, 4), 1e9, dtype=F64)))
            statistics.update(padded, torch.arange(4) < len(batch))
    ranks.append(ChannelStatistics())
    ranks[-1].update(zs[:4], torch.zeros(4).bool())

    with ThreadPoolExecutor(len(ranks)) as threads:
        all_reduce = LockStep(len(ranks))
        reduced = list(threads.map(lambda statistics: statistics.reduced(all_reduce), ranks))
    for count, mean, std in [channel_statistics(zs.split(7)), *reduced]:
        assert count == 30 * 16
        torch.testing.assert_close(mean, expected_mean, rtol=1e-14, atol=1e-9)
        torch.testing.assert_close(std, expected_std, rtol=1e-6, atol=0)
    with pytest.raises(BadInput, match="latents: expected at least one batch"):
        channel_statistics([])


def test_scale_shift_has_one_source_and_lives_in_the_checkpoint() -> None:
    zs = Stage1Encodings(torch.randn(2, 2, 4, 4))
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    fresh = ScaleShift()
    assert fresh.needs_statistics()
    for use in (fresh.forward, fresh.reverse):
        with pytest.raises(BadInput, match="connector: expected statistics before use"):
            use(zs)
    fresh.latent_shape((2, 4, 4))
    unfinished = fresh.state_dict()
    fresh.set_statistics(mean, std)
    assert not fresh.needs_statistics()
    with pytest.raises(BadInput, match="one source of scale, got statistics although an estimate"):
        fresh.set_statistics(mean, std)
    shaped = ScaleShift()
    shaped.latent_shape((2, 4, 4))
    for prepared in (ScaleShift(), shaped):
        prepared.load_state_dict(fresh.state_dict())
        assert not prepared.needs_statistics()
        torch.testing.assert_close(prepared(zs).zs[:, 1], (zs.zs[:, 1] - 2) / 4)
    still = ScaleShift()
    still.load_state_dict(unfinished)
    assert still.needs_statistics()
    given = ScaleShift(mean=[1, 2], std=[3, 4])
    given.load_state_dict(fresh.state_dict())
    assert not given.needs_statistics()
    with pytest.raises(BadInput, match="although the configuration gives them"):
        given.set_statistics(mean, std)
    with pytest.raises(BadInput, match="connector.std: expected one source of scale"):
        ScaleShift(mean=[1, 2], std=[3, 5]).load_state_dict(fresh.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScaleShift(mean=[1.0]), "expected mean and std together or neither"),
        (lambda: ScaleShift(mean=[1.0, 2.0], std=[1.0]), r"of shape \(C,\), got \(2,\) and \(1,\)"),
        (lambda: ScaleShift(mean=[1.0, 1.0], std=[1.0, 0.0]), r"expected finite numbers > 0 .* channels \[1\]"),
        (
            lambda: ScaleShift(mean=[1.0], std=[1.0]).latent_shape((2, 4, 4)),
            "expected 2 channels as in the latent, got 1",
        ),
        (
            lambda: ScaleShift(mean=[1.0], std=[1.0])(Stage1Encodings(torch.zeros(1, 2, 4, 4))),
            "latent: expected 1 channels",
        ),
        (lambda: ReshapeConnector(0, 3), "connector: expected height and width >= 1, got 0 and 3"),
    ],
)
def test_bad_connector_is_named(make: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make()


# TwoStage


class Halver(Stage1Model):
    """z = 4 x - 1 at half the side, with a parameter to freeze and a dropout to switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(4.0))
        self.dropout = nn.Dropout(0.5)
        self.encoded = 0

    def encode(self, inputs: LabeledImageData) -> Stage1Encodings:
        self.encoded += 1
        return Stage1Encodings(self.dropout(self.gain * inputs.require_img()[..., ::2, ::2] - 1))

    def decode(self, encodings: Stage1Encodings) -> Stage1ModelOutput:
        return Stage1ModelOutput(((encodings.zs + 1) / self.gain).repeat_interleave(2, 2).repeat_interleave(2, 3))

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (image_shape[0], image_shape[1] // 2, image_shape[2] // 2)


def two_stage(spec: DataSpec = ACTIONS, connector: base_connector | None = None) -> TwoStage:
    connector = connector or ScaleShift(mean=[1.0, 2.0, 3.0], std=[2.0, 2.0, 2.0])
    shape = connector.latent_shape(Halver().latent_shape(spec.image_shape))
    stage2 = LatentDiffusion(shape, spec, backbone=lambda shape, spec: small_dit(shape, spec), sampler=Sampler(steps=2))
    return TwoStage(Halver(), connector, stage2, spec.image_shape)


def image_batch(model: TwoStage, size: int = 2, context: Tensor | None = None) -> LabeledImageData:
    draws = [fill(model.stage2.draws(model.latent_shape), 0, i) for i in range(size)]
    img = torch.rand(size, 3, 8, 8, generator=generator(1))
    stacked = {k: torch.stack([d[k] for d in draws]) for k in draws[0]}
    return LabeledImageData(img=img, condition=actions(size, context=context), draws=stacked)


def test_prepare_encodes_images_and_context_the_same_way() -> None:
    model = two_stage().train()
    frames = torch.rand(2, 2, 3, 8, 8, generator=generator(2))
    batch = image_batch(model, context=frames)
    ready = model.prepare(batch)
    shift = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    torch.testing.assert_close(ready.encodings.zs, (4 * batch.img[..., ::2, ::2] - 1 - shift) / 2)
    torch.testing.assert_close(ready.condition.context, (4 * frames[..., ::2, ::2] - 1 - shift) / 2)
    assert batch.encodings is None
    assert batch.condition.context is frames
    assert not ready.encodings.zs.requires_grad
    encoded_before = model.stage1.encoded
    cached = Stage1Encodings(4 * batch.img[..., ::2, ::2] - 1)
    again = model.prepare(replace(batch, encodings=cached, img=None, condition=ready.condition))
    assert model.stage1.encoded == encoded_before
    assert torch.equal(again.encodings.zs, ready.encodings.zs)
    assert again.condition.context is ready.condition.context
    with pytest.raises(BadInput, match=r"condition.context: expected frames \(B, K, 3, 8, 8\), or latents"):
        model.prepare(replace(batch, condition=actions(2, context=torch.zeros(2, 2, 1, 8, 8))))


def test_stage1_is_frozen_and_no_part_of_stage2() -> None:
    model = two_stage().train()
    assert not model.stage1.training
    assert model.stage2.training
    assert not any(p.requires_grad for p in model.stage1.parameters())
    assert not any("stage1" in k or "gain" in k for k in model.stage2.state_dict())
    randomised(model.stage2)
    losses, _ = model.training_loss(image_batch(model))
    losses.loss_total.backward()
    assert all(p.grad is None for p in model.stage1.parameters())
    assert all(p.grad is not None for p in model.stage2.parameters())


def test_training_loss_calls_the_wrapped_forward_once() -> None:
    model = two_stage()
    randomised(model.stage2)
    calls = []

    def wrapped(encodings: Stage1Encodings, batch: LabeledImageData) -> Stage2ModelOutput:
        calls.append(batch.encodings is encodings)
        return model.stage2(encodings, batch)

    losses, output = model.training_loss(image_batch(model), wrapped)
    assert calls == [True]
    bare, _ = model.training_loss(image_batch(model))
    assert torch.equal(bare.loss_total, losses.loss_total)
    assert set(output.additional_attr) == {"t", "target"}


def test_samples_and_reconstructions_are_images() -> None:
    model = two_stage().train()
    randomised(model.stage2)
    noise = torch.randn(2, *model.latent_shape, generator=generator(3))
    output = model.sample(actions(2), noise)
    assert model.stage2.training
    assert output.zs_pred.shape == noise.shape
    images = model.decode(output)
    assert images.shape == (2, 3, 8, 8)
    assert ((images >= 0) & (images <= 1)).all()
    model.stage2.backbone.blocks[0].dropout.p = 0.5
    assert torch.equal(model.sample(actions(2), noise).zs_pred, output.zs_pred)
    assert model.sample(actions(2), noise, Sampler(heun, steps=3)).additional_attr == {"nfe": 5}
    blocky = torch.rand(2, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(model.reconstruct(blocky), blocky, rtol=1e-6, atol=1e-6)
    with pytest.raises(BadInput, match=r"noise: expected \(B, 3, 4, 4\), got \(2, 3, 8, 8\)"):
        model.sample(actions(2), torch.zeros(2, 3, 8, 8))
    with pytest.raises(BadInput, match="condition: expected 2 samples as in noise, got 3"):
        model.sample(actions(3), noise)


def test_a_training_step_reads_nothing_back_from_the_device() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReadBack(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    model = two_stage()
    batch = image_batch(model, context=torch.rand(2, 2, 3, 8, 8))
    with NoReadBack():
        model.training_loss(batch)[0].loss_total.backward()
