"""The whole way by the demo's own commands, with budgets of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rqvae.demo import nearest_psnr
from tests.conftest import finish, start

SHORT = [
    "--frames",
    4000,
    "--starts",
    2,
    "--threads",
    1,
    "--train.steps",
    6,
    "--checkpoint.every",
    3,
    "--data.workers",
    0,
    "--pictures.every",
    "null",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    code, errors = finish(start("demo", "--out", root, *SHORT))
    assert code == 0, errors
    return root


@pytest.mark.slow
def test_demo_leaves_its_summary_and_page(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    for key in ("stage1_psnr", "stage1_ssim", "nearest_train_psnr", "cpu_seconds", "seconds"):
        assert np.isfinite(summary[key]), key
    assert set(summary["parts"]) == {"collect", "stage1", "recon", "latents", "stage2", "rollout", "sample"}
    assert np.isfinite(summary["world"]["one_step"]["psnr_moving"])
    assert list(summary["world"]["player_visible"]) == ["1", "2", "4", "8", "16", "32", "64"]
    with Image.open(demo / "dream.gif") as film:
        assert film.n_frames == 64
    page = (demo / "report" / "index.html").read_text()
    assert "data:image/png" in page
    assert "data:image/gif" in page
    assert (demo / "rollout.html").exists()
    assert f"{summary['stage1_psnr']:.4g}" in page


@pytest.mark.slow
def test_second_call_reuses_what_is_done(demo: Path) -> None:
    before = json.loads((demo / "summary.json").read_text())
    files = {p: p.stat().st_mtime_ns for p in demo.rglob("*.safetensors")}
    code, errors = finish(start("demo", "--out", demo, *SHORT))
    assert code == 0, errors
    after = json.loads((demo / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*.safetensors")} == files
    for key in ("stage1_psnr", "stage1_ssim", "nearest_train_psnr"):
        assert after[key] == before[key]


def test_nearest_psnr_against_a_direct_computation() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (20, 3, 8, 8), np.uint8)
    samples = rng.integers(0, 256, (3, 3, 8, 8), np.uint8)
    expected = []
    for sample in samples:
        errors = [np.mean((sample.astype(float) - frame.astype(float)) ** 2) for frame in frames]
        expected.append(10 * np.log10(255**2 / min(errors)))
    assert nearest_psnr(samples, frames) == pytest.approx(expected)
    assert nearest_psnr(frames[:1], frames)[0] == pytest.approx(100.0)
