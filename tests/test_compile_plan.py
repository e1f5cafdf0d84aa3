"""`--compile_plan`: trainers, samples and recon compile exactly the submodules that a plan lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from rqvae.diagnostics.plan import CompilePlan
from tests.conftest import ROOT, only

KL_VAE = """
stage1:
  class_path: rqvae.models.stage1.kl_vae.KLVAE
  init_args: {latent_channels: 4, width: 16, multipliers: [1, 2], blocks: 1, norm_groups: 8, kl_weight: 1.0e-6}
"""
SHORT = ["--train.steps", 1, "--pictures.every", "null", "--checkpoint.every", 1]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What is compiled in place, as it is."""
    seen: list[nn.Module] = []
    monkeypatch.setattr("rqvae.diagnostics.plan.compile_in_place", lambda module, _: seen.append(module))
    return seen


def test_trainers_samples_and_recon_compile_what_a_plan_lists(
    cli: Callable[..., int], tmp_path: Path, compiled: list[nn.Module]
) -> None:
    CompilePlan(compiler="eager", compile=["conv_in", "conv_out"]).write(tmp_path / "plan.yaml")
    plan = ["--compile_plan", tmp_path / "plan.yaml"]

    def the_two() -> bool:
        convolutions = [(type(m), m.in_channels, m.out_channels) for m in compiled if isinstance(m, nn.Conv2d)]
        compiled.clear()
        return convolutions == [(nn.Conv2d, 4, 32), (nn.Conv2d, 16, 3)]

    stage1 = [ROOT / "configs/debug/stage1.yaml", *SHORT, "--online_eval.every", "null"]
    assert cli("train", *stage1, *plan, "--save-dir", tmp_path, "--project", "one", "--run-name", "r") == 0
    assert the_two()
    run = only(tmp_path / "one")
    assert cli("recon", stage1[0], "--ckpt", run, *plan, "--save-dir", tmp_path / "recon", "--run-name", "r") == 0
    assert the_two()
    (tmp_path / "stage1.yaml").write_text(f"{KL_VAE}stage1_checkpoint: {run}\n")
    stage2 = [ROOT / "configs/debug/stage2.yaml", tmp_path / "stage1.yaml", *SHORT]
    assert cli("train", *stage2, *plan, "--save-dir", tmp_path, "--project", "two", "--run-name", "r") == 0
    assert the_two()
    out = ["--num", 2, "--steps", 1, "--out", tmp_path / "samples.npz"]
    assert cli("sample", only(tmp_path / "two"), *out, *plan) == 0
    assert the_two()
