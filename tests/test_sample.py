"""`python -m rqvae sample` and the notebook's three lines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.diffusion.guidance import Autoguidance, ClassifierFree, Interval
from rqvae.diffusion.sampling import Sampler
from tests.conftest import finish, only, start

STAGE2 = "configs/debug/stage2.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rqvae.cli import run

    folder = tmp_path_factory.mktemp("trained")
    line = ["train", STAGE2, "--save-dir", str(folder), "--project", "p", "--run-name", "r", "--train.steps", "2"]
    assert run(line) == 0
    return only(folder / "p")


def test_npz_folder_and_provenance(trained: Path, tmp_path: Path, cli) -> None:
    line = ["sample", trained, "--num", 10, "--batch-size", 4, "--steps", 3, "--solver", "heun", "--cfg", 2]
    assert cli(*line, "--out", tmp_path / "a.npz") == 0
    assert cli(*line, "--out", tmp_path / "a") == 0
    with np.load(tmp_path / "a.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (10, 16, 16, 3)
    assert images.dtype == np.uint8
    classes = 6
    assert labels.tolist() == [i % classes for i in range(10)]
    files = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "a").glob("*.png"))]
    assert np.array_equal(np.stack(files), images)
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["nfe"] == 5, "Heun: two a step, the last step is Euler's"
    assert facts["protocol"]["nfe"] == 5
    assert cli(*line, "--out", tmp_path / "a.npz") == 0, "one that is done is left alone"
    assert (facts["solver"], facts["steps"], facts["seed"], facts["step"]) == ("heun", 3, 0, 2)
    assert facts["weights"] == "ema_0.9"
    assert "2" in facts["guidance"]
    assert not (tmp_path / "a.npz.parts").exists()


def test_same_images_for_any_world_size_and_after_a_cut(trained: Path, tmp_path: Path, cli) -> None:
    line = ["sample", trained, "--num", 10, "--batch-size", 4, "--steps", 2, "--class", "1,2", "--seed", 7]
    assert cli(*line, "--out", tmp_path / "one.npz") == 0
    code, errors = finish(start(*line, "--out", tmp_path / "two.npz", "--world-size", 2))
    assert code == 0, errors
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert np.array_equal(one, two)
    parts = tmp_path / "cut.npz.parts"
    process = start(*line, "--out", tmp_path / "cut.npz")
    while process.poll() is None and not list(parts.glob("*.npy")):
        pass
    process.kill()
    process.wait()
    assert cli(*line, "--out", tmp_path / "cut.npz") == 0
    assert np.array_equal(np.load(tmp_path / "cut.npz")["arr_0"], one)


def test_batch_size_changes_no_image_by_more_than_rounding(trained: Path, tmp_path: Path, cli) -> None:
    found = []
    for size in (3, 10):
        line = ["sample", trained, "--num", 10, "--steps", 2, "--batch-size", size, "--out", tmp_path / f"{size}.npz"]
        assert cli(*line) == 0
        found.append(np.load(tmp_path / f"{size}.npz")["arr_0"].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1
    assert (found[0] != found[1]).mean() < 1e-3


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--class", 99], "--class"), (["--class", "a"], "--class"), (["--solver", "eulr"], "--solver"),
        (["--num", 0], "--num"), (["--steps", 0], "steps"), (["--colour", 1], "--colour"),
    ],
)  # fmt: skip
def test_bad_input(trained: Path, tmp_path: Path, cli, capfd, more: list, expected: str) -> None:
    assert cli("sample", trained, "--out", tmp_path / "x.npz", *more) == 2
    said = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error: ")]
    assert len(said) == 1
    assert expected in said[0]
    assert not list(tmp_path.iterdir())


def test_three_lines(trained: Path) -> None:
    import rqvae

    pipeline = rqvae.load(trained)
    assert pipeline.nfe is None
    images = pipeline.sample(3, steps=2, seed=1)
    assert pipeline.nfe == 2
    assert images.shape == (3, 3, 16, 16)
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal(images[:2], pipeline.sample(3, steps=2, seed=1)[:2])
    assert torch.allclose(pipeline.decode(pipeline.encode(images)), images, atol=1e-6)
    assert torch.allclose(pipeline.reconstruct(images), images, atol=1e-6)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    import rqvae
    from rqvae.errors import BadInput

    with pytest.raises(BadInput, match="config.yaml"):
        rqvae.load(tmp_path)


@pytest.mark.parametrize(
    ("own", "scale", "expected"),
    [
        (None, 3.0, ClassifierFree(3.0)),
        (ClassifierFree(2.0), 3.0, ClassifierFree(3.0)),
        (Interval(2.0, 0.2, 0.8), 3.0, Interval(3.0, 0.2, 0.8)),
        (Autoguidance(torch.add, 2.0), 3.0, Autoguidance(torch.add, 3.0)),
        (Interval(2.0, 0.2, 0.8), None, Interval(2.0, 0.2, 0.8)),
        (Interval(2.0, 0.2, 0.8), 1.0, None),
    ],
)
def test_another_scale_is_of_the_runs_own_kind_of_guidance(own, scale, expected) -> None:
    from rqvae.api import change_sampler

    two_stage = SimpleNamespace(stage2=SimpleNamespace(sampler=Sampler(guidance=own)))
    assert change_sampler(two_stage, guidance=scale).guidance == expected  # type: ignore[arg-type]
