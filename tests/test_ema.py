"""Running averages of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rqvae.errors import BadInput
from rqvae.models.ema import EMA


@pytest.mark.parametrize("warmup", [False, True])
def test_equals_the_closed_form(warmup: bool) -> None:
    module = nn.Linear(3, 2).double()
    ema = EMA(module, 0.9, warmup)
    expected = {k: v.detach().clone() for k, v in module.named_parameters()}
    for n in range(30):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        expected = {k: decay * expected[k] + (1 - decay) * p.detach() for k, p in module.named_parameters()}
    for key, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


def test_average_of_bf16_weights_is_fp32_and_does_not_stall() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.zero_()
    ema = EMA(module, 0.999, warmup=False)
    with torch.no_grad():
        module.weight.fill_(1)
    stalls = torch.zeros((), dtype=torch.bfloat16)
    for n in range(3000):
        ema.update(n)
        stalls.lerp_(torch.ones((), dtype=torch.bfloat16), 0.001)
    assert float(ema.average["weight"]) == pytest.approx(1 - 0.999**3000, rel=1e-4)
    assert float(stalls) < 0.3


def test_applied_computes_with_the_average_and_restores() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    ema = EMA(module, 0.5, warmup=False)
    x = torch.randn(8, 4)
    module(x)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    ema.update(0)
    averaged = copy.deepcopy(module)
    averaged.load_state_dict({**module.state_dict(), **ema.state_dict()})
    before = {k: v.clone() for k, v in module.state_dict().items()}
    pointers = [p.data_ptr() for p in module.parameters()]
    with ema.applied(), torch.no_grad():
        assert torch.equal(module.eval()(x), averaged.eval()(x))
        assert not torch.equal(module[0].weight, before["0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert pointers == [p.data_ptr() for p in module.parameters()], "optimizers hold these very tensors"


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decay(decay: float) -> None:
    with pytest.raises(BadInput, match="ema"):
        EMA(nn.Linear(1, 1), decay)
