"""The linear DiT against diffusers' SanaTransformer2DModel, and attention against its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, ClassCondition, DataSpec
from rqvae.models.layers.linear_attention import MixFFN, relu_linear_attention
from rqvae.models.stage2.linear_dit import LinearDiT, weights_from_sana

SANA = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "mlp_ratio": 2.5, "caption_channels": 12}


def sana(qk_norm: bool, patch: int) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(
        in_channels=8,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=patch,
        qk_norm="rms_norm_across_heads" if qk_norm else None,
        **SANA,
    )
    for p in model.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def ours(qk_norm: bool, patch: int) -> LinearDiT:
    spec = DataSpec((3, 8, 12), num_classes=5)
    shapes = {"depth": 2, "width": 32, "heads": 4, "cross_heads": 2, "patch": patch, "qk_norm": qk_norm}
    return LinearDiT((4, 8, 12), spec, conditioning="cross_attention", in_channels=8, **shapes).eval()


@pytest.mark.parametrize(("qk_norm", "patch"), [(True, 1), (False, 2)])
def test_equals_sana_of_diffusers(qk_norm: bool, patch: int) -> None:
    theirs, model = sana(qk_norm, patch), ours(qk_norm, patch)
    missing, unexpected = model.load_state_dict(weights_from_sana(theirs.state_dict()), strict=False)
    assert not unexpected
    assert {name.partition(".")[0] for name in missing} == {"tokens"}
    x, t = torch.randn(3, 8, 8, 12), torch.tensor([0.01, 0.4, 0.97])
    caption = torch.randn(3, 6, 12)
    visible = torch.ones(3, 6, dtype=torch.bool)
    visible[1, 4:] = False
    with torch.no_grad():
        expected = theirs(x, caption, 1000 * t, encoder_attention_mask=visible).sample
        tokens = theirs.caption_norm(theirs.caption_projection(caption))
        answer = model.trunk(x, model.time(t), tokens, visible)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


def test_linear_attention_is_its_definition() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 5, dtype=torch.float64).unbind(0)
    q[..., 0] = k[..., 0] = 0.1  # no query without a positive part: its mean is 0 / 0
    scores = q.relu() @ k.relu().transpose(-1, -2)
    expected = (scores / scores.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(relu_linear_attention(q, k, v), expected, atol=1e-12, rtol=1e-10)


def test_linear_attention_in_half_precision_does_not_overflow() -> None:
    large = torch.full((1, 1, 4096, 8), 20.0, dtype=torch.float16)
    assert relu_linear_attention(large, large, large).isfinite().all()


def test_tokens_know_where_they_are() -> None:
    torch.manual_seed(0)
    ffn, x = MixFFN(8), torch.randn(1, 12, 8)
    order = torch.arange(12).flip(0)
    assert not torch.allclose(ffn(x, 3)[:, order], ffn(x[:, order], 3), atol=1e-4)


def actions(mask: list[list[bool]]) -> tuple[LinearDiT, ActionCondition]:
    torch.manual_seed(0)
    model = LinearDiT((4, 8, 8), DataSpec((3, 8, 8), num_actions=5, history=3), depth=2, width=32, heads=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    chosen = torch.tensor([[0, 1, 2], [3, 4, 0]])
    return model, ActionCondition(None, chosen, torch.tensor(mask), 5)


def answer(model: LinearDiT, condition: ActionCondition) -> Tensor:
    return model(torch.ones(2, 4, 8, 8), torch.tensor([0.2, 0.8]), condition)


def test_missing_history_is_not_seen_and_is_not_nan() -> None:
    model, condition = actions([[False, False, False], [False, True, True]])
    changed = replace(condition, actions=torch.tensor([[4, 3, 1], [1, 4, 0]]))
    first, second = answer(model, condition), answer(model, changed)
    assert first.isfinite().all()
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    seen = replace(condition, actions=torch.tensor([[0, 1, 2], [3, 4, 2]]))
    assert not torch.allclose(answer(model, seen)[1], first[1])


def test_the_null_action_is_not_noop() -> None:
    model, condition = actions([[True] * 3, [True] * 3])
    noop = replace(condition, actions=torch.zeros_like(condition.actions))
    assert not torch.allclose(answer(model, condition.null()), answer(model, noop))


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "both"])
def test_learns_from_every_parameter_and_begins_at_zero(conditioning: str) -> None:
    model = LinearDiT(
        (4, 8, 12),
        DataSpec((3, 8, 12), num_classes=3),
        depth=1,
        width=16,
        heads=2,
        cross_heads=2,
        conditioning=conditioning,
    )
    condition = ClassCondition(torch.tensor([0, 3]), 3)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([0.1, 0.9])
    assert model(x, t, condition).abs().max() == 0
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model(x, t, condition).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_refuses_what_does_not_fit() -> None:
    spec = DataSpec((3, 8, 8), num_classes=3)
    with pytest.raises(BadInput, match="patch"):
        LinearDiT((4, 8, 6), spec, patch=4)
    with pytest.raises(BadInput, match="heads"):
        LinearDiT((4, 8, 8), spec, width=30, heads=4)
    model = LinearDiT((4, 8, 8), spec, depth=1, width=16, heads=2)
    with pytest.raises(BadInput, match="ClassCondition of 3"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), None)
    with pytest.raises(BadInput, match="latent"):
        model(torch.zeros(1, 4, 8, 4), torch.zeros(1), ClassCondition(torch.zeros(1, dtype=torch.long), 3))
