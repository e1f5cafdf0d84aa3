"""DiT, connectors, latent diffusion and the two-stage model."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from rqvae.diffusion import ClassifierFree, LinearFlow, Sampler, euler, heun
from rqvae.errors import BadInput
from rqvae.models.connectors import ChannelStatistics, ReshapeConnector, ScaleShift, base_connector, channel_statistics
from rqvae.models.interfaces import (
    ActionCondition,
    ClassCondition,
    DataSpec,
    LabeledImageData,
    Stage1Encodings,
    Stage1Model,
    Stage1ModelOutput,
    Stage2ModelOutput,
)
from rqvae.models.layers.embeddings import ActionEmbedding, sincos_2d
from rqvae.models.stage2 import DiT, LatentDiffusion
from rqvae.models.two_stage import TwoStage
from rqvae.randomness import fill, generator

F64 = torch.float64
CLASSES = DataSpec((3, 8, 8), num_classes=3)
ACTIONS = DataSpec((3, 8, 8), num_actions=5, history=2)
PLAIN = DataSpec((3, 8, 8))


def small_dit(latent_shape: tuple[int, ...] = (3, 8, 8), spec: DataSpec = CLASSES, **changes: Any) -> DiT:
    torch.manual_seed(0)
    return DiT(latent_shape, spec, **({"depth": 2, "width": 32, "heads": 2} | changes))


def classes(batch: int) -> ClassCondition:
    return ClassCondition(torch.arange(batch) % 3, 3)


def actions(batch: int, **changes: Any) -> ActionCondition:
    slots = torch.arange(2 * batch).view(batch, 2) % 5
    return replace(ActionCondition(None, slots, torch.ones(batch, 2).bool(), 5), **changes)


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter normal: zero-initialised layers would hide what is before them."""
    rng = generator(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return module


def diffusion(spec: DataSpec = CLASSES, **changes: Any) -> LatentDiffusion:
    return LatentDiffusion((3, 8, 8), spec, backbone=lambda shape, spec: small_dit(shape, spec), **changes)


def batch_for(model: LatentDiffusion, condition: Any, size: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """Clean latents and a batch with the draws that the model asks for, filled as the feed does it."""
    samples = [fill(model.draws((3, 8, 8)), seed=0, sample_id=i) for i in range(size)]
    draws = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    zs = torch.randn(size, 3, 8, 8, generator=generator(5)).to(dtype)
    return Stage1Encodings(zs=zs), LabeledImageData(condition=condition, draws=draws)


# DiT


@pytest.mark.parametrize(("rows", "columns", "width"), [(16, 16, 64), (2, 5, 8), (3, 1, 12)])
def test_position_embedding_is_the_formula(rows: int, columns: int, width: int) -> None:
    table = sincos_2d(width, rows, columns)
    quarter = width // 4
    for r in range(rows):
        for c in range(columns):
            angles = [[p / 10000 ** (i / quarter) for i in range(quarter)] for p in (c, r)]
            expected = [f(a) for row in angles for f in (math.sin, math.cos) for a in row]
            torch.testing.assert_close(table[r * columns + c], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    if (rows, columns) == (16, 16):
        theirs = get_2d_sincos_pos_embed(width, (16, 16), output_type="pt")
        torch.testing.assert_close(table, theirs.float(), rtol=1e-6, atol=1e-6)


def load_into_diffusers(ours: DiT, theirs: DiTTransformer2DModel) -> None:
    """Copy weights into diffusers' DiT, whose first patch embedding is a convolution and whose q, k, v are three."""
    mine, state = ours.state_dict(), theirs.state_dict()
    state["pos_embed.proj.weight"] = mine["embed.weight"].view_as(state["pos_embed.proj.weight"])
    state["pos_embed.proj.bias"] = mine["embed.bias"]
    renamed = {
        "norm1.emb.timestep_embedder.linear_1": "time.first",
        "norm1.emb.timestep_embedder.linear_2": "time.second",
        "norm1.linear": "blocks.{i}.modulation",
        "attn1.to_out.0": "blocks.{i}.attention.out",
        "ff.net.0.proj": "blocks.{i}.mlp.0",
        "ff.net.2": "blocks.{i}.mlp.2",
    }
    for i, block in enumerate(theirs.transformer_blocks):
        at = f"transformer_blocks.{i}."
        for kind in ("weight", "bias"):
            for their_name, our_name in renamed.items():
                state[f"{at}{their_name}.{kind}"] = mine[f"{our_name.format(i=i)}.{kind}"]
            for name, part in zip("qkv", mine[f"blocks.{i}.attention.qkv.{kind}"].chunk(3), strict=True):
                state[f"{at}attn1.to_{name}.{kind}"] = part
        state[f"{at}norm1.emb.class_embedder.embedding_table.weight"] = mine["condition.table.weight"]
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the paper's code; diffusers divides by 127
    for kind in ("weight", "bias"):
        state[f"proj_out_1.{kind}"], state[f"proj_out_2.{kind}"] = (
            mine[f"final_modulation.{kind}"],
            mine[f"final.{kind}"],
        )
    theirs.load_state_dict(state)


def test_dit_answers_as_the_one_of_diffusers() -> None:
    settings = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    theirs = DiTTransformer2DModel(**settings, num_layers=3, sample_size=32, num_embeds_ada_norm=10, norm_eps=1e-6)
    ours = randomised(small_dit((4, 32, 32), DataSpec((3, 32, 32), num_classes=10), depth=3, width=64, heads=4))
    load_into_diffusers(ours, theirs)
    x, t_b, label = torch.randn(3, 4, 32, 32, generator=generator(0)), torch.tensor([0.0, 0.5, 0.999]), torch.arange(3)
    with torch.no_grad():
        answer = ours.eval()(x, t_b, ClassCondition(label, 10))
        expected = theirs.eval()(x, timestep=1000 * t_b, class_labels=label).sample
    assert answer.std() > 0.1
    torch.testing.assert_close(answer, expected, rtol=2e-4, atol=2e-4)


def test_parameters_are_those_of_the_paper() -> None:
    """DiT-XL/2 of facebookresearch/DiT logs 675,129,632: it predicts 8 channels, and counts its position table."""
    with torch.device("meta"):
        xl = DiT((4, 32, 32), DataSpec((3, 256, 256), num_classes=1000), size="XL")
    four_more_channels, positions = 2 * 2 * 4 * (1152 + 1), 256 * 1152
    assert sum(p.numel() for p in xl.parameters()) + four_more_channels + positions == 675_129_632


@pytest.mark.parametrize(
    ("size", "depth", "width", "heads"), [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16)]
)
def test_sizes_are_table_1_and_explicit_numbers_win(size: Any, depth: int, width: int, heads: int) -> None:
    with torch.device("meta"):
        model = DiT((4, 32, 32), CLASSES, size=size)
        shallow = DiT((4, 32, 32), CLASSES, size=size, depth=1)
    assert (len(model.blocks), model.embed.out_features, model.blocks[0].attention.heads) == (depth, width, heads)
    assert (len(shallow.blocks), shallow.embed.out_features) == (1, width)
    block, d = model.blocks[0], width
    assert tuple(block.modulation.weight.shape) == (6 * d, d)
    assert tuple(block.attention.qkv.weight.shape) == (3 * d, d)
    assert tuple(block.mlp[0].weight.shape) == (4 * d, d)
    per_block = 6 * d * (d + 1) + 4 * d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1)
    rest = (16 + 1) * d + (256 + 1) * d + (d + 1) * d + 4 * d + 2 * d * (d + 1) + 16 * (d + 1)
    assert sum(p.numel() for p in model.parameters()) == depth * per_block + rest


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", [CLASSES, ACTIONS, PLAIN], ids=["classes", "actions", "plain"])
def test_dit_is_zero_at_init_and_keeps_the_shape_of_oblong_latents(patch: Any, spec: DataSpec) -> None:
    model = small_dit((3, 8, 16), spec, patch=patch)
    condition = {CLASSES: classes(2), ACTIONS: actions(2), PLAIN: None}[spec]
    answer = model(torch.randn(2, 3, 8, 16), torch.rand(2), condition)
    assert answer.shape == (2, 3, 8, 16)
    assert torch.equal(answer, torch.zeros_like(answer))


def test_patches_and_image_are_inverse_and_local() -> None:
    """A token holds one square of the latent: changing it changes that square's token alone."""
    model = small_dit((3, 8, 16), patch=4)
    x = torch.randn(1, 3, 8, 16)
    changed = x.clone()
    changed[:, :, 4:8, 8:12] += 1
    differs = (model._patches(x) != model._patches(changed)).any(2)[0]
    assert differs.nonzero().flatten().tolist() == [1 * 4 + 2]
    # the answer's patches are (p, p, C), the input's (C, p, p)
    tokens = model._patches(x).unflatten(2, (3, 4, 4)).movedim(2, -1).flatten(2)
    assert torch.equal(model._image(tokens), x)


@pytest.mark.parametrize("spec", [CLASSES, ACTIONS, PLAIN], ids=["classes", "actions", "plain"])
def test_every_parameter_learns_within_three_steps(spec: DataSpec) -> None:
    """Three, as adaLN-Zero opens from the end: final layer, then modulation, then the blocks and what feeds them."""
    model = diffusion(spec)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    condition = {CLASSES: classes(4), ACTIONS: actions(4), PLAIN: None}[spec]
    encodings, batch = batch_for(model, condition)
    for _ in range(3):
        optimizer.zero_grad()
        model.compute_loss(encodings, model(encodings, batch), batch).loss_total.backward()
        optimizer.step()
    assert [k for k, p in model.named_parameters() if torch.equal(p, before[k])] == []


def test_dropout_acts_in_training_only() -> None:
    model = randomised(small_dit(dropout=0.5))
    x, t_b = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert not torch.equal(model(x, t_b, classes(2)), model(x, t_b, classes(2)))
    model.eval()
    assert torch.equal(model(x, t_b, classes(2)), model(x, t_b, classes(2)))


def test_action_null_and_missing_have_vectors_of_their_own() -> None:
    embedding = ActionEmbedding(5, 2, 16)
    condition = actions(3)
    null = condition.null()
    assert (null.actions.shape, null.mask.shape, len(null)) == (condition.actions.shape, condition.mask.shape, 3)
    rows = embedding.table.weight.view(2, 7, 16)
    torch.testing.assert_close(embedding(null), (rows[0, 5] + rows[1, 5]).expand(3, 16))
    torch.testing.assert_close(embedding(condition)[1], rows[0, 2] + rows[1, 3])
    missing_first = replace(condition, mask=torch.tensor([[False, True]]).expand(3, 2))
    torch.testing.assert_close(embedding(missing_first)[1], rows[0, 6] + rows[1, 3])
    assert not torch.allclose(embedding(actions(3, actions=condition.actions.flip(1))), embedding(condition))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small_dit((3, 9, 8)), "stage2.patch: expected latent sides divisible by 2, got 9 x 8"),
        (lambda: small_dit((3, 8, 12), patch=8), "divisible by 8, got 8 x 12"),
        (lambda: small_dit(patch=3), "stage2.patch: expected 1, 2, 4 or 8, got 3"),
        (lambda: small_dit(heads=3), "width: expected a multiple of heads = 3, got 32"),
        (lambda: small_dit(width=30), "width: expected a multiple of 4 for the position embedding, got 30"),
        (
            lambda: DiT((3, 8, 8), CLASSES, depth=2, width=32),
            "stage2.heads: expected a number >= 1, or a size, got None",
        ),
        (lambda: small_dit(depth=0), "stage2.depth: expected a number >= 1, or a size, got 0"),
        (lambda: small_dit((64, 8)), r"stage2: expected a latent \(C, h, w\), got \(64, 8\)"),
        (lambda: small_dit(spec=replace(ACTIONS, num_classes=3)), "expected classes or actions"),
        (lambda: small_dit(spec=replace(PLAIN, num_mask_classes=3)), "num_mask_classes 3"),
        (lambda: small_dit(spec=replace(ACTIONS, history=0)), "data.history: expected at least 1 slot"),
        (
            lambda: small_dit()(torch.zeros(2, 3, 4, 4), torch.rand(2), classes(2)),
            r"latent: expected \(B, 3, 8, 8\), got",
        ),
        (lambda: small_dit()(torch.zeros(2, 3, 8, 8), torch.rand(2), None), "expected ClassCondition of 3 .* NoneType"),
        (lambda: small_dit()(torch.zeros(2, 3, 8, 8), torch.rand(2), actions(2)), "got ActionCondition of 5 actions"),
        (lambda: small_dit(spec=PLAIN)(torch.zeros(2, 3, 8, 8), torch.rand(2), classes(2)), "condition: expected None"),
        (
            lambda: small_dit(spec=ACTIONS)(
                torch.zeros(1, 3, 8, 8),
                torch.rand(1),
                ActionCondition(None, torch.zeros(1, 3).long(), torch.ones(1, 3) > 0, 5),
            ),
            r"expected actions and mask \(B, 2\), got \(1, 3\)",
        ),
        (lambda: diffusion(drop_condition=1.5), r"stage2.drop_condition: expected a number in \[0, 1\], got 1.5"),
        (lambda: diffusion(prediction="eps"), "sampler.start: expected < 1, .* eps on LinearFlow"),
        (
            lambda: diffusion(drop_condition=0.0, sampler=Sampler(guidance=ClassifierFree(2.0))),
            "sampler.guidance: expected",
        ),
        (lambda: diffusion().infer(LabeledImageData(), noise=torch.zeros(1, 3, 8, 8)), "condition: expected one"),
        (
            lambda: diffusion()(Stage1Encodings(torch.zeros(1, 3, 8, 8)), LabeledImageData()),
            "draws.noise: expected numbers",
        ),
    ],
)
def test_bad_input_is_named(make: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words) as error:
        make()
    assert "\n" not in str(error.value)


# LatentDiffusion


@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps"])
def test_forward_is_the_path_and_the_loss_is_the_mean_square(prediction: Any) -> None:
    model = randomised(diffusion(prediction=prediction, sampler=Sampler(start=0.999))).double().eval()
    encodings, batch = batch_for(model, classes(4), dtype=F64)
    output = model(encodings, batch)
    noise, t = batch.draws["noise"].double(), batch.draws["t"].double().view(4, 1, 1, 1)
    x0 = encodings.zs
    assert output.zs_pred.dtype == output.zs_degraded.dtype == F64
    torch.testing.assert_close(output.zs_degraded, (1 - t) * x0 + t * noise, rtol=0, atol=1e-15)
    target = {"velocity": noise - x0, "x0": x0, "eps": noise}[prediction]
    losses = model.compute_loss(encodings, output, batch)
    per_sample = torch.stack([((output.zs_pred[i] - target[i]) ** 2).sum() / 192 for i in range(4)])
    torch.testing.assert_close(losses.per_sample, per_sample)
    torch.testing.assert_close(losses.loss_total, per_sample.mean())


class Recorder(nn.Module):
    """A backbone that keeps the conditions it is given, and answers with the point itself."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[list[int]] = []

    def forward(self, x: Tensor, t_b: Tensor, condition: ClassCondition) -> Tensor:
        assert t_b.shape == (len(x),)
        self.labels.append(condition.label.tolist())
        return x


def test_conditions_are_dropped_by_the_draw_and_in_training_only() -> None:
    model = LatentDiffusion((3, 8, 8), CLASSES, backbone=lambda *_: Recorder(), drop_condition=0.5)
    encodings, batch = batch_for(model, classes(4))
    batch = replace(batch, draws=batch.draws | {"drop": torch.tensor([0.49, 0.5, 0.0, 0.9])})
    model.train()(encodings, batch)
    model.eval()(encodings, batch)
    assert model.backbone.labels == [[3, 1, 3, 0], [0, 1, 2, 0]]
    assert set(model.draws((3, 8, 8))) == {"noise", "t", "drop"}
    assert set(diffusion(PLAIN).draws((3, 8, 8))) == {"noise", "t"}
    assert set(diffusion(drop_condition=0.0).draws((3, 8, 8))) == {"noise", "t"}


class Exact(nn.Module):
    """The best possible answer for data N(mean, std^2) on the linear path, in any prediction."""

    def __init__(self, prediction: Any, mean: float = 0.5, std: float = 0.3) -> None:
        super().__init__()
        self.prediction, self.mean, self.std = prediction, mean, std

    def forward(self, x: Tensor, t_b: Tensor, condition: None) -> Tensor:
        t = t_b.view(-1, 1, 1, 1)
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        x0 = self.mean + gain * (x - (1 - t) * self.mean)
        return {"x0": x0, "eps": (x - (1 - t) * x0) / t, "velocity": (x - x0) / t}[self.prediction]


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps"])
def test_sampling_ends_at_the_data_whatever_is_predicted(solver: Any, prediction: Any) -> None:
    sampler = Sampler(solver, steps=400, start=0.999)
    model = LatentDiffusion(
        (3, 8, 8), PLAIN, backbone=lambda *_: Exact(prediction), prediction=prediction, sampler=sampler
    )
    noise = torch.randn(2, 3, 8, 8, dtype=F64, generator=generator(0))
    output = model.infer(LabeledImageData(), noise=noise)
    torch.testing.assert_close(output.zs_pred, 0.5 + 0.3 * noise, rtol=0, atol=0.02)
    assert output.additional_attr == {"nfe": 400 if solver is euler else 799}
    fewer = model.infer(LabeledImageData(), noise=noise, sampler=replace(sampler, solver=euler, steps=3))
    assert fewer.additional_attr == {"nfe": 3}


def test_guided_sampling_is_the_combination_of_two_forwards() -> None:
    model = randomised(diffusion(sampler=Sampler(steps=1, guidance=ClassifierFree(3.0)))).double().eval()
    noise = torch.randn(2, 3, 8, 8, dtype=F64, generator=generator(0))
    condition, ones = classes(2), torch.ones(2, dtype=F64)
    got = model.infer(LabeledImageData(condition=condition), noise=noise).zs_pred
    conditional, null = model.backbone(noise, ones, condition), model.backbone(noise, ones, condition.null())
    torch.testing.assert_close(got, noise - (null + 3 * (conditional - null)), rtol=1e-10, atol=1e-10)
    assert not got.requires_grad


def test_training_on_one_batch_lowers_the_loss() -> None:
    model = diffusion()
    encodings, batch = batch_for(model, classes(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model.compute_loss(encodings, model(encodings, batch), batch).loss_total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # At first the answer is zero: the loss is the mean square of noise - x0, two unit variances.
    assert losses[0] == pytest.approx(2, abs=0.3)
    assert losses[-1] < 0.5 * losses[0]


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
    with pytest.raises(BadInput, match=r"condition.context: expected frames \(B, K, 3, 8, 8\) or latents"):
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


def test_linear_flow_is_the_default_path() -> None:
    assert isinstance(diffusion().path, LinearFlow)
    assert diffusion().sampler == Sampler(euler, steps=50, shift=1.0, guidance=None)
