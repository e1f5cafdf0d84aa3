"""Paths and the one table of conversions against closed forms, autograd and diffusers' tables."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from rqvae.diffusion import VP, Denoiser, LinearFlow, Path
from rqvae.errors import BadInput
from rqvae.randomness import generator

F64 = torch.float64
PREDICTIONS = ("velocity", "x0", "eps", "v")
PATHS = [LinearFlow(), VP("cosine"), VP("linear"), VP("cosine", shift=4.0), VP("linear", shift=0.5)]
EVERY_PATH = pytest.mark.parametrize("path", PATHS, ids=["flow", "cosine", "ddpm", "cosine_4", "ddpm_0.5"])


def triple(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(seed)
    noise, x0 = torch.randn(2, 6, 3, 4, 5, dtype=F64, generator=rng)
    return noise, x0, torch.linspace(0.05, 0.95, 6, dtype=F64)


def truth(path: Path) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t, t and every prediction at it; the velocity by autograd, the rest by its definition."""
    noise, x0, t_b = triple()
    x_t, velocity = torch.func.jvp(lambda t: path.interpolate(noise, x0, t), (t_b,), (torch.ones_like(t_b),))
    alpha, sigma = (w.view(-1, 1, 1, 1) for w in (path.alpha(t_b), path.sigma(t_b)))
    return x_t, t_b, {"x0": x0, "eps": noise, "velocity": velocity, "v": alpha * noise - sigma * x0}


def test_linear_flow_is_the_straight_line() -> None:
    noise, x0, t_b = triple()
    for i in range(len(t_b)):
        expected = x0[i] + t_b[i] * (noise[i] - x0[i])
        torch.testing.assert_close(LinearFlow().interpolate(noise, x0, t_b)[i], expected, rtol=0, atol=1e-14)
    assert torch.equal(LinearFlow().target("velocity", noise, x0, t_b), noise - x0)
    assert torch.equal(LinearFlow().interpolate(noise, x0, torch.zeros(6, dtype=F64)), x0)
    assert torch.equal(LinearFlow().interpolate(noise, x0, torch.ones(6, dtype=F64)), noise)


def test_ddpm_law_is_the_table_of_a_thousand_steps() -> None:
    steps = torch.arange(1, 1001, dtype=F64) / 1000
    table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)
    torch.testing.assert_close(VP("linear").alpha(steps).square(), table, rtol=2e-8, atol=0)
    theirs = DDIMScheduler(beta_schedule="linear").alphas_cumprod.double()
    torch.testing.assert_close(VP("linear").alpha(steps).square(), theirs, rtol=2e-5, atol=0)
    # The continuous limit, beta(t) = 0.1 + 19.9 t (Song et al. 2021), differs by far more: it is another law.
    assert (table.log() + 0.1 * steps + 9.95 * steps**2).abs().max() > 0.02


def test_cosine_law_and_its_ends() -> None:
    t = torch.linspace(0, 1, 101, dtype=F64)
    torch.testing.assert_close(VP("cosine").alpha(t), torch.cos(t * math.pi / 2), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(VP("cosine").sigma(t), torch.sin(t * math.pi / 2), rtol=1e-14, atol=1e-15)
    for dtype in (torch.float32, F64):
        ends = torch.tensor([0.0, 1.0], dtype=dtype)
        assert VP("cosine", 4.0).alpha(ends).tolist() == [1, 0]
        assert VP("cosine", 4.0).sigma(ends).tolist() == [0, 1]


@pytest.mark.parametrize("law", ["cosine", "linear"])
@pytest.mark.parametrize("shift", [1.0, 4.0, 0.5])
def test_vp_keeps_variance_and_shift_moves_log_snr(law: Any, shift: float) -> None:
    t = torch.linspace(0.001, 0.999, 500, dtype=F64)
    plain, moved = VP(law), VP(law, shift)
    torch.testing.assert_close(moved.alpha(t) ** 2 + moved.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)
    log_snr, moved_log_snr = (2 * (p.alpha(t).log() - p.sigma(t).log()) for p in (plain, moved))
    # Hoogeboom et al. 2023: + 2 log(base / resolution), and shift = resolution / base
    torch.testing.assert_close(moved_log_snr, log_snr + 2 * math.log(1 / shift), rtol=0, atol=1e-11)
    single = t.float()
    torch.testing.assert_close(moved.sigma(single).double(), moved.sigma(single.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(moved.alpha(single).double(), moved.alpha(single.double()), rtol=0, atol=3e-7)


@EVERY_PATH
def test_targets_are_their_definitions_and_velocity_is_the_derivative(path: Path) -> None:
    noise, x0, t_b = triple()
    for prediction, expected in truth(path)[2].items():
        torch.testing.assert_close(path.target(prediction, noise, x0, t_b), expected, rtol=1e-11, atol=1e-12)  # type: ignore[arg-type]


@EVERY_PATH
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_conversion_gives_the_true_quantity(path: Path, source: Any, target: Any) -> None:
    x_t, t_b, true = truth(path)
    converted = path.convert(true[source], x_t, t_b, source, target)
    torch.testing.assert_close(converted, true[target], rtol=1e-10, atol=1e-10)
    back = path.convert(converted, x_t, t_b, target, source)
    torch.testing.assert_close(back, true[source], rtol=1e-10, atol=1e-10)
    for i in range(len(t_b)):
        row = slice(i, i + 1)
        (asked,) = Denoiser(lambda x, t, row=row: true[source][row], path, source).at(x_t[row], t_b[i], target)
        torch.testing.assert_close(asked, true[target][row], rtol=1e-10, atol=1e-10)


@EVERY_PATH
def test_a_denoiser_in_fp32_keeps_fp32_and_asks_once(path: Path) -> None:
    calls = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return torch.sin(x)

    x = torch.randn(4, 3, generator=generator(0))
    near_data = torch.tensor(1e-3, dtype=F64)
    got = Denoiser(predict, path, "eps").at(x, near_data, "x0", "v", "eps")
    exact = Denoiser(lambda x, t: torch.sin(x.float()).double(), path, "eps").at(x.double(), near_data, "x0", "v")
    assert len(calls) == 1
    assert [value.dtype for value in got] == [torch.float32] * 3
    for ours, oracle in zip(got, exact, strict=False):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-6, atol=1e-6)


def test_determinant_is_zero_where_a_prediction_says_nothing() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    for path in (LinearFlow(), VP("cosine"), VP("cosine", 4.0)):
        assert (path.determinant("eps", ends) == 0).tolist() == [False, True]
        assert (path.determinant("x0", ends) == 0).tolist() == [True, False]
        assert (path.determinant("velocity", ends) == 0).tolist() == [False, False]
        assert (path.determinant("v", ends) == 0).tolist() == [False, False]
    assert VP("linear").determinant("eps", ends)[1] > 0.006  # DDPM's last step keeps some of the data
    with pytest.raises(BadInput, match=r"prediction: expected one of .*x0.*, got noise"):
        LinearFlow().target("noise", ends, ends, ends)  # type: ignore[arg-type]


def test_bad_vp_settings_are_named() -> None:
    with pytest.raises(BadInput, match="path.law: expected one of linear, cosine, got sigmoid"):
        VP("sigmoid")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="path.shift: expected a number > 0, got 0"):
        VP(shift=0.0)
