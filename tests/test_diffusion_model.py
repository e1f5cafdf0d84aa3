"""LatentDiffusion with the paths, solvers and guidances of the diffusion room, in Python and from a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rqvae.diffusion import (
    DDIM,
    VP,
    Autoguidance,
    EulerMaruyama,
    Interval,
    LinearFlow,
    Sampler,
    dpm_solver_pp_2m,
    euler,
    heun,
)
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec, LabeledImageData
from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.randomness import generator
from tests.conftest import only, rows

F64 = torch.float64
SHAPE = (3, 8, 8)
PLAIN = DataSpec((3, 8, 8))
CLASSES = DataSpec((3, 8, 8), num_classes=3)
MEAN, STD = 0.5, 0.3


class Exact(nn.Module):
    """The best answer for data N(MEAN, STD^2) on any path, which counts the rows that it sees."""

    def __init__(self, path: Any, prediction: Any, mean: float = MEAN) -> None:
        super().__init__()
        self.path, self.prediction, self.mean, self.rows = path, prediction, mean, 0

    def forward(self, x: Tensor, t_b: Tensor, condition: ClassCondition | None) -> Tensor:
        assert condition is None or len(condition) == len(x)
        self.rows += len(x)
        alpha, sigma = (w.view(-1, 1, 1, 1) for w in (self.path.alpha(t_b), self.path.sigma(t_b)))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = self.mean + gain * (x - alpha * self.mean)
        return self.path.convert(x0, x, t_b, "x0", self.prediction)


def model(path: Any, prediction: Any, sampler: Sampler, spec: DataSpec = PLAIN, mean: float = MEAN) -> LatentDiffusion:
    backbone = Exact(path, prediction, mean)
    return LatentDiffusion(
        SHAPE, spec, backbone=lambda *_: backbone, path=path, prediction=prediction, sampler=sampler
    ).eval()


def noise(samples: int) -> Tensor:
    return torch.randn(samples, *SHAPE, dtype=F64, generator=generator(0))


@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps", "v"])
@pytest.mark.parametrize("path", [LinearFlow(), VP("cosine"), VP("linear"), VP("cosine", 4.0)])
@pytest.mark.parametrize("solver", [heun, dpm_solver_pp_2m, DDIM()])
def test_ode_ends_at_the_data_in_every_composition(solver: Any, path: Any, prediction: Any) -> None:
    sampling = model(path, prediction, Sampler(solver, steps=200, start=0.999))
    got = sampling.infer(LabeledImageData(), noise=noise(2))
    torch.testing.assert_close(got.zs_pred, MEAN + STD * noise(2), rtol=0, atol=0.04)
    assert got.additional_attr == {"nfe": 399 if solver is heun else 200}


@pytest.mark.parametrize("solver", [DDIM(0.7), EulerMaruyama()])
def test_stochastic_sample_does_not_depend_on_its_batch(solver: Any) -> None:
    sampling = model(VP("cosine"), "v", Sampler(solver, steps=120))
    whole = sampling.infer(LabeledImageData(), noise=noise(40)).zs_pred
    assert torch.equal(sampling.infer(LabeledImageData(), noise=noise(40)).zs_pred, whole)
    part = sampling.infer(LabeledImageData(), noise=noise(40)[[7, 3]]).zs_pred
    torch.testing.assert_close(part, whole[[7, 3]], rtol=0, atol=1e-14)
    assert float(whole.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(whole.std()) == pytest.approx(STD, abs=0.02)
    ode = sampling.infer(LabeledImageData(), noise=noise(40), sampler=Sampler(DDIM(), steps=40)).zs_pred
    assert (whole - ode).abs().mean() > 0.05


def test_another_model_guides_whatever_it_predicts() -> None:
    """Guide N(0.2, s^2) and model N(0.5, s^2): extrapolated by 3, the mean is 0.2 + 3 (0.5 - 0.2)."""
    guide = model(LinearFlow(), "x0", Sampler(), mean=0.2)
    sampler = Sampler(heun, steps=60, guidance=Autoguidance(guide.predictor("velocity"), scale=3.0))
    guided = model(LinearFlow(), "velocity", sampler)
    got = guided.infer(LabeledImageData(), noise=noise(2))
    torch.testing.assert_close(got.zs_pred, 1.1 + STD * noise(2), rtol=0, atol=0.02)
    assert got.additional_attr == {"nfe": 119}
    assert guided.backbone.rows == guide.backbone.rows == 119 * 2


def test_interval_spares_rows_of_the_backbone() -> None:
    guidance = Interval(2.0, start=0.25, end=0.55)
    sampling = model(LinearFlow(), "velocity", Sampler(euler, steps=10, guidance=guidance), CLASSES)
    condition = ClassCondition(torch.tensor([0, 2, 1]), 3)
    got = sampling.infer(LabeledImageData(condition=condition), noise=noise(3))
    assert got.additional_attr == {"nfe": 10}
    assert sampling.backbone.rows == 3 * 7 + 6 * 3


def test_a_prediction_that_says_nothing_at_pure_noise_is_refused() -> None:
    with pytest.raises(BadInput, match="sampler.start: expected < 1, for example 0.999, as eps on VP"):
        model(VP("cosine"), "eps", Sampler())
    model(VP("linear"), "eps", Sampler())
    model(VP("cosine"), "v", Sampler())


COMPOSITION = """
stage2:
  init_args:
    path: {class_path: rqvae.diffusion.vp.VP, init_args: {law: cosine, shift: 4.0}}
    prediction: v
    sampler:
      steps: 3
      solver: {class_path: rqvae.diffusion.solvers.DDIM, init_args: {eta: 0.5}}
      guidance: {class_path: rqvae.diffusion.guidance.Interval, init_args: {scale: 2.0, start: 0.1, end: 0.8}}
train: {steps: 2}
pictures: {every: 2 steps, images: 4}
"""


def test_a_config_composes_them(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "composition.yaml").write_text(COMPOSITION)
    line = ("configs/debug/stage2.yaml", "--config", tmp_path / "composition.yaml")
    assert cli("train", *line, "--save-dir", tmp_path / "s", "--project", "p") == 0
    run = only(tmp_path / "s" / "p")
    # At first the network answers zero: the loss is the mean square of v = alpha eps - sigma x0.
    assert 0.3 < rows(run)[0]["train/loss_total"] < 1.5
    assert list((run / "samples").iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{path: {class_path: rqvae.diffusion.vp.VP, init_args: {law: cosin}}}", "law.*cosin"),
        ("{path: {class_path: rqvae.diffusion.vp.VP, init_args: {shift: 0}}}", "expected a number > 0, got 0"),
        ("{sampler: {solver: {class_path: rqvae.diffusion.solvers.DDIM, init_args: {eta: 3}}}}", "solver.eta.*got 3"),
        ("{sampler: {solver: rqvae.diffusion.solvers.eulr}}", "eulr"),
    ],
)
def test_a_bad_composition_is_one_line(text: str, words: str, tmp_path: Path, cli: Any, capfd: Any) -> None:
    (tmp_path / "bad.yaml").write_text(f"stage2: {{init_args: {text}}}\n")
    line = ("configs/debug/stage2.yaml", "--config", tmp_path / "bad.yaml")
    assert cli("train", *line, "--save-dir", tmp_path / "s", "--project", "p") == 2
    said = capfd.readouterr().err
    assert re.search(words, said), said
    assert said.count("error: ") == 1
