"""DiT, connectors, latent diffusion and the two-stage model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from rqvae.diffusion import ClassifierFree, LinearFlow, Sampler, euler, heun
from rqvae.errors import BadInput
from rqvae.models.interfaces import (
    ActionCondition,
    ClassCondition,
    DataSpec,
    LabeledImageData,
    Stage1Encodings,
)
from rqvae.models.layers.embeddings import ActionEmbedding, sincos_2d
from rqvae.models.stage2 import DiT, LatentDiffusion
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


def test_blocks_begin_as_the_identity() -> None:
    model = small_dit()
    tokens, active = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, active), tokens)


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
        (lambda: small_dit(spec=replace(CLASSES, num_mask_classes=3)), "num_mask_classes 3"),
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


def test_linear_flow_is_the_default_path() -> None:
    assert isinstance(diffusion().path, LinearFlow)
    assert diffusion().sampler == Sampler(euler, steps=50, shift=1.0, guidance=None)
