"""`train.initial_weights`: a run begins with the weights of another one or of an exported folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rqvae
from rqvae.errors import BadInput
from tests.conftest import assert_same, only, tensors
from tests.test_api import ON_LATENTS, STAGE1, STAGE2

ONE = {"train.steps": 4, "checkpoint.every": 2, "online_eval.every": None}
STILL = {"train.steps": 1, "checkpoint.every": 1, "updates.generator.lr": 1e-12}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stage, and both as they are exported."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    stage1 = rqvae.Run.load(STAGE1, ONE).fit(folder, "one", "p")
    config = {**ON_LATENTS, "stage1_checkpoint": str(stage1)}
    stage2 = rqvae.Run.load(STAGE2, config).fit(folder, "two", "p")
    for name, run in (("one_out", stage1), ("two_out", stage2)):
        rqvae.load(run).save_pretrained(folder / name)
    return {"one": stage1, "two": stage2, "one_out": folder / "one_out", "two_out": folder / "two_out"}


def begun(first: dict[str, Path], source: str, folder: Path, **more: object) -> Path:
    config = {**ON_LATENTS, **STILL, "stage1_checkpoint": str(first["one"]), **more}
    return rqvae.Run.load(STAGE2, {**config, "train.initial_weights": str(first[source])}).fit(folder, "new", "p")


@pytest.mark.parametrize("source", ["two", "two_out"])
def test_a_generator_begins_with_the_evaluated_weights(first: dict[str, Path], source: str, tmp_path: Path) -> None:
    """At a rate of 1e-12 its first checkpoint is what the other run evaluates, in the weights and in the average."""
    expected = load_file(first["two_out"] / "stage2" / "model.safetensors")
    trained = load_file(only(first["two"] / "checkpoints", "step_*2") / "model" / "stage2.safetensors")
    assert any(not torch.equal(expected[k], trained[k]) for k in expected), "an average, not the last step"
    found = tensors(begun(first, source, tmp_path), 1)
    for group in ("model", "ema_0.9"):
        for key, tensor in expected.items():
            value = found.get(f"{group}/stage2:{key}")
            assert value is not None or group != "model"
            if value is not None:
                torch.testing.assert_close(value, tensor, rtol=1e-6, atol=1e-7)
    connector = load_file(first["two_out"] / "connector" / "model.safetensors")
    assert connector
    assert all(torch.equal(found[f"model/connector:{key}"], value) for key, value in connector.items())


def test_an_autoencoder_begins_with_them(first: dict[str, Path], tmp_path: Path) -> None:
    config = {**ONE, "train.steps": 1, "updates.autoencoder.lr": 1e-12, "train.initial_weights": str(first["one_out"])}
    run = rqvae.Run.load(STAGE1, config).fit(tmp_path, "new", "p")
    expected, found = load_file(first["one_out"] / "stage1" / "model.safetensors"), tensors(run, 1)
    assert all(torch.allclose(found[f"model/stage1:{key}"], value, atol=1e-7) for key, value in expected.items())


def test_a_resumed_run_does_not_need_them(first: dict[str, Path], tmp_path: Path) -> None:
    sources = {**first, "gone": tmp_path / "gone"}
    shutil.copytree(first["two_out"], sources["gone"])
    run = begun(sources, "gone", tmp_path / "runs", **{"train.steps": 2})
    whole = tensors(run, 2)
    shutil.rmtree(sources["gone"])
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    (run / "FINISHED").unlink()
    assert rqvae.Run.load(run).fit() == run.resolve()
    assert_same(tensors(run, 2), whole)
    with pytest.raises(BadInput, match="^train.initial_weights: .*gone: no such checkpoint or run folder"):
        begun(sources, "gone", tmp_path / "other")
    assert not list((tmp_path / "other").rglob("step_*"))


def test_a_generator_of_other_latents_is_refused(first: dict[str, Path], tmp_path: Path) -> None:
    other = rqvae.Run.load(STAGE1, {**ONE, "train.seed": 5}).fit(tmp_path, "other", "p")
    for source in ("two", "two_out"):
        with pytest.raises(BadInput, match="^train.initial_weights: .*expected a generator of the Stage1 weights"):
            begun({**first, "one": other}, source, tmp_path / "runs")
    with pytest.raises(BadInput, match="^train.initial_weights: .*one_out: expected a run or checkpoint folder"):
        begun(first, "one_out", tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("config.yaml"))
