"""Power-function averages (Karras et al. 2024) and averages of other lengths from their snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta as beta_law
from torch import nn

import rqvae
from rqvae.errors import BadInput
from rqvae.models.power_ema import LONGEST, PowerEMA, Profile, combine, exponent_of, overlap
from rqvae.trainers import checkpoint
from rqvae.trainers.ema_snapshots import Snapshot, weighted_sum
from tests.conftest import assert_same, only, tensors


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.2, LONGEST])
def test_exponent_gives_the_width(sigma_rel: float) -> None:
    """The profile over [0, 1] is the density of Beta(g + 1, 1); its standard deviation is scipy's, not ours."""
    exponent = exponent_of(sigma_rel)
    assert beta_law(exponent + 1, 1).std() == pytest.approx(sigma_rel, rel=1e-9)


def test_exponents_of_the_paper() -> None:
    """Section 3.1: sigma_rel 0.05 and 0.10 are exponents 16.97 and 6.94."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29])
def test_width_out_of_range(sigma_rel: float) -> None:
    with pytest.raises(BadInput, match="sigma_rel"):
        exponent_of(sigma_rel)


def walk(steps: int, size: int = 3) -> torch.Tensor:
    """(steps, size) weights after each step, float64."""
    return torch.randn(steps, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cumsum(0)


def tracked(weights: torch.Tensor, sigma_rel: float, keep: set[int]) -> dict[int, torch.Tensor]:
    """A PowerEMA that follows `weights`, and its average after the steps in `keep` (counted from 1)."""
    module = nn.Linear(weights.shape[1], 1, bias=False).double()
    ema, kept = PowerEMA(module, sigma_rel), {}
    for n, row in enumerate(weights):
        with torch.no_grad():
            module.weight.copy_(row[None])
        ema.update(n)
        if n + 1 in keep:
            kept[n + 1] = ema.average["weight"][0].clone()
    return kept


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_average_is_the_integral_of_the_profile(sigma_rel: float) -> None:
    """The weights after step s count by the integral of the density over [s - 1, s]: brute force, by scipy's law."""
    weights, exponent = walk(200), exponent_of(sigma_rel)
    law = beta_law(exponent + 1, 1)
    share = torch.tensor(np.diff(law.cdf(np.arange(201) / 200)))
    assert float(share.sum()) == pytest.approx(1)
    torch.testing.assert_close(tracked(weights, sigma_rel, {200})[200], share @ weights, rtol=1e-10, atol=1e-10)


def test_a_step_that_was_not_applied_leaves_the_average() -> None:
    module = nn.Linear(3, 1)
    for applied in (True, False):
        ema = PowerEMA(module, 0.1)
        plain = PowerEMA(module, 0.1)
        with torch.no_grad():
            module.weight.add_(1)
        before = ema.average["weight"].clone()
        ema.update(7, torch.tensor(applied))
        plain.update(7)
        assert torch.equal(ema.average["weight"], plain.average["weight"] if applied else before)


def test_overlap_is_the_integral_of_the_product() -> None:
    for a, b in ((Profile(2.0, 3.0), Profile(5.5, 4.0)), (Profile(17.0, 9.0), Profile(17.0, 9.0))):
        pdf = [beta_law(p.exponent + 1, 1, scale=p.t).pdf for p in (a, b)]
        value, _ = quad(lambda t, f=pdf[0], g=pdf[1]: f(t) * g(t), 0, min(a.t, b.t))
        assert overlap(a, b) == pytest.approx(value, rel=1e-8)


def test_overlap_of_a_long_run_stays_finite() -> None:
    a, b = Profile(exponent_of(0.01), 2e6), Profile(exponent_of(0.01), 1e6)
    assert 0 < overlap(a, b) < overlap(b, b) < float("inf")


def profiles(steps: int, every: int) -> list[Profile]:
    return [Profile(exponent_of(s), t) for t in range(every, steps + 1, every) for s in (0.05, 0.10)]


def test_a_tracked_average_is_found_exactly() -> None:
    snapshots = profiles(1000, 100)
    found = combine(snapshots, Profile(exponent_of(0.10), 1000))
    expected = [0.0] * (len(snapshots) - 1) + [1.0]
    assert found.coefficients == pytest.approx(expected, abs=1e-6)
    assert found.profile_error < 1e-6


def test_coefficients_are_those_of_a_dense_least_squares() -> None:
    """The densities on a fine grid, fitted by numpy's solver for rectangular systems: no Gram matrix."""
    snapshots, wanted = profiles(8, 2), Profile(exponent_of(0.075), 8)
    grid = (np.arange(400_000) + 0.5) * (8 / 400_000)
    columns = np.stack([beta_law(p.exponent + 1, 1, scale=p.t).pdf(grid) for p in snapshots], 1)
    target = beta_law(wanted.exponent + 1, 1, scale=8).pdf(grid)
    dense, *_ = np.linalg.lstsq(columns, target, rcond=None)
    found = combine(snapshots, wanted)
    assert found.coefficients == pytest.approx(dense, abs=1e-4)
    error = np.linalg.norm(columns @ found.coefficients - target) / np.linalg.norm(target)
    assert found.profile_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.06, 5e-3), (0.075, 5e-3), (0.15, 2e-2)])
def test_untracked_average_against_the_one_tracked_directly(sigma_rel: float, tolerance: float, tmp_path: Path) -> None:
    """On weights that diffuse, through snapshots on disk; the error is against the spread of the weights."""
    steps, every = 1000, 50
    weights = walk(steps, 64)
    keep = set(range(every, steps + 1, every))
    snapshots = []
    for width in (0.05, 0.10):
        name = f"power_ema_{width:g}/m"
        for t, average in tracked(weights, width, keep).items():
            folder = tmp_path / f"{width}" / f"step_{t:08d}"
            checkpoint.save(folder, {name: {"weight": average}}, {})
            snapshots.append(Snapshot(folder, name, Profile(exponent_of(width), t)))
    found = combine([s.profile for s in snapshots], Profile(exponent_of(sigma_rel), steps))
    rebuilt = weighted_sum(snapshots, found.coefficients)["weight"]
    direct = tracked(weights, sigma_rel, {steps})[steps]
    spread = (weights - direct).pow(2).mean().sqrt()
    assert float((rebuilt - direct).pow(2).mean().sqrt() / spread) < tolerance
    nearest = tracked(weights, 0.10, {steps})[steps]
    assert (rebuilt - direct).norm() < 0.1 * (nearest - direct).norm(), "no better than a snapshot"


POWER = ["--ema.power", "[0.05,0.1,0.075]", "--ema.snapshot_every", 1]
"""The third is what the others are to give."""


def line(config: str, save_dir: Path, *more: object) -> list[object]:
    return ["train", f"configs/debug/{config}.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r", *more]


@pytest.mark.parametrize(("config", "module"), [("stage1", "stage1"), ("stage2", "stage2")])
def test_command_gives_a_run_that_loads(config: str, module: str, tmp_path: Path, cli, capfd, monkeypatch) -> None:
    monkeypatch.setattr("rqvae.trainers.posthoc_ema.read_snapshots", without_the_third)
    precise = ["--ema.snapshot_dtype", "fp32"]
    assert cli(*line(config, tmp_path, *POWER, *precise, "--pictures.every", "null")) == 0
    run = only(tmp_path / "p")
    assert len(list((run / "ema_snapshots").iterdir())) == 20, "keep_last does not touch them"
    out = tmp_path / "out"
    assert cli("ema", run, "--sigma-rel", 0.075, "--out", out) == 0
    assert "sigma_rel 0.075 at step 20 from 40 snapshots" in capfd.readouterr().out
    direct = {k.partition(":")[2]: v for k, v in tensors(run, 20).items() if k.startswith("power_ema_0.075/")}
    loaded = rqvae.load(out)
    network = loaded.stage1 if module == "stage1" else loaded.two_stage.stage2  # type: ignore[union-attr]
    own = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    online = {k.partition(":")[2]: v for k, v in tensors(run, 20).items() if k.startswith(f"model/{module}:")}
    far = sum(float((online[k] - direct[k]).norm() ** 2) for k in own) ** 0.5
    near = sum(float((own[k] - direct[k]).norm() ** 2) for k in own) ** 0.5
    # of 20 steps each is a coarse piece of the profile, and the schedule of stage 2 ends at a learning rate of 0
    assert near < 0.15 * far
    if config == "stage2":
        assert cli("sample", out, "--num", 2, "--steps", 2, "--out", tmp_path / "s.npz") == 0
        assert json.loads(next(tmp_path.glob("s*.json")).read_text())["weights"] == "posthoc_ema_0.075"


def without_the_third(run: Path) -> list[Snapshot]:
    from rqvae.trainers.ema_snapshots import read_snapshots

    return [snapshot for snapshot in read_snapshots(run) if "0.075" not in snapshot.name]


def test_evaluated_average_is_the_one_that_is_named(tmp_path: Path, cli, capfd) -> None:
    more = ["--ema.power", "[0.1]", "--train.steps", 4]
    for name in ("null", "power_ema_0.1"):
        assert cli(*line("stage1", tmp_path / name, *more, "--ema.evaluate", name)) == 0
        folder = only(tmp_path / name / "p")
        expected = "ema_0.9" if name == "null" else name
        assert checkpoint.read_meta(folder / "checkpoints" / "step_00000004")["evaluate"] == expected
        loaded = rqvae.load(folder).stage1.state_dict()
        stored = {k.partition(":")[2]: v for k, v in tensors(folder, 4).items() if k.startswith(f"{expected}/")}
        assert_same({k: loaded[k] for k in stored}, stored)
    capfd.readouterr()
    assert cli(*line("stage1", tmp_path, *more, "--ema.evaluate", "ema_0.5")) == 2
    assert "ema.evaluate: expected one of ema_0.9, power_ema_0.1, got ema_0.5" in capfd.readouterr().err


def test_resume_is_exact_and_snapshots_are_those_of_an_undisturbed_run(tmp_path: Path, cli) -> None:
    more = ["--ema.power", "[0.05,0.1]", "--ema.snapshot_every", 4]
    assert cli(*line("stage2", tmp_path / "whole", *more)) == 0
    whole = only(tmp_path / "whole" / "p")
    half = ["--resume-ckpt", whole / "checkpoints" / "step_00000015"]
    assert cli(*line("stage2", tmp_path / "half", *more, *half)) == 0
    resumed = only(tmp_path / "half" / "p")
    assert_same(tensors(whole, 20), tensors(resumed, 20))
    assert [p.name for p in sorted((resumed / "ema_snapshots").iterdir())] == ["step_00000016", "step_00000020"]
    for file in (resumed / "ema_snapshots").rglob("*.safetensors"):
        assert file.read_bytes() == (whole / file.relative_to(resumed)).read_bytes()


def test_half_precision_snapshots_are_half_the_size_and_never_overflow(tmp_path: Path) -> None:
    from rqvae.trainers.ema_snapshots import _compact

    assert _compact(torch.tensor([1.0, 60000.0])).dtype == torch.float16
    assert torch.equal(_compact(torch.tensor([1.0, 70000.0])), torch.tensor([1.0, 70000.0]))


def test_bad_requests_are_one_line(tmp_path: Path, cli, capfd) -> None:
    assert cli(*line("stage1", tmp_path, "--train.steps", 2)) == 0
    run = only(tmp_path / "p")
    snapshots = tmp_path / "with"
    assert cli(*line("stage1", snapshots, "--train.steps", 4, "--ema.power", "[0.1]", "--ema.snapshot_every", 2)) == 0
    other = only(snapshots / "p")
    out = ["--out", tmp_path / "out"]
    cases = [
        ([tmp_path / "nowhere", "--sigma-rel", 0.1, *out], "expected a run folder"),
        ([run, "--sigma-rel", 0.1, *out], "expected snapshots in ema_snapshots"),
        ([other, "--sigma-rel", 0.5, *out], "sigma_rel: expected a number in (0, 0.2887], got 0.5"),
        ([other, "--sigma-rel", 0.1, "--step", 3, *out], "--step: expected a step with a snapshot (2, 4), got 3"),
        ([other, "--sigma-rel", 0.1, "--out", run], "expected a folder that does not exist yet"),
    ]
    for arguments, words in cases:
        capfd.readouterr()
        assert cli("ema", *arguments) == 2
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1
        assert words in said[0]
    file = next((other / "ema_snapshots").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert cli("ema", other, "--sigma-rel", 0.1, *out) == 2
    assert "the file is damaged" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli(*line("stage1", tmp_path, "--ema.power", "[0.3]")) == 2
    assert "ema.power: expected different numbers in (0, 0.2886], got [0.3]" in capfd.readouterr().err
