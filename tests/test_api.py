"""The Python API: `rqvae.load` from every kind of place, `rqvae.Run`, and the hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import rqvae
from rqvae import shipped
from rqvae.errors import BadInput
from tests.conftest import ROOT, assert_same, only, tensors
from tests.hub_server import running_hub

STAGE1, STAGE2 = "configs/debug/stage1.yaml", "configs/debug/stage2.yaml"
KL_VAE = {
    "class_path": "rqvae.models.stage1.kl_vae.KLVAE",
    "init_args": {"latent_channels": 4, "width": 16, "multipliers": [1, 2], "blocks": 1, "norm_groups": 8},
}
ON_LATENTS = {"stage1": KL_VAE, "connector": {"class_path": "rqvae.models.connectors.ScaleShift"}, "train.steps": 2}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stage1 run and a Stage2 run on it, trained by the API with paths relative to the folder they are in."""
    folder = tmp_path_factory.mktemp("tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        stage1 = rqvae.Run.load(ROOT / STAGE1, {"train.steps": 4, "checkpoint.every": 2}).fit("runs", "one", "p")
        assert stage1.is_dir()
        config = {**ON_LATENTS, "stage1_checkpoint": str(stage1)}
        rqvae.Run.load(ROOT / STAGE2, config).fit("runs", "two", "p")
    return folder


def run_of(tree: Path, name: str) -> Path:
    return only(tree / "runs" / "p", f"{name}_*")


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_fit_trains_what_the_command_trains(tmp_path: Path, cli) -> None:
    overrides = {"train.steps": 3, "ema.decays": [0.9], "updates.autoencoder.lr": 2e-3}
    folder = rqvae.Run.load(STAGE1, overrides).fit(tmp_path / "api", "r", "p")
    assert folder == only(tmp_path / "api" / "p")
    words = ["--train.steps", 3, "--ema.decays", "[0.9]", "--updates.autoencoder.lr", "2e-3"]
    line = ["train", STAGE1, *words, "--save-dir", tmp_path / "cli", "--project", "p", "--run-name", "r"]
    assert cli(*line) == 0
    command = only(tmp_path / "cli" / "p")
    assert_same(tensors(folder, 3), tensors(command, 3))
    assert (folder / "config.yaml").read_text() == (command / "config.yaml").read_text()
    again = rqvae.Run.load(STAGE1, [str(word) for word in words]).fit(tmp_path / "api", "r", "p")
    assert again == folder, "the same call finds the finished run"


def test_a_run_folder_goes_on_where_it_is(tmp_path: Path) -> None:
    first = rqvae.Run.load(STAGE1, {"train.steps": 4, "checkpoint.every": 2}).fit(tmp_path, "a_name", "p")
    whole = tensors(first, 4)
    shutil.rmtree(first / "checkpoints" / "step_00000004")
    (first / "FINISHED").unlink()
    run = rqvae.Run.load(first)
    assert (run.name, run.stage, run.config["train"]["steps"]) == ("a_name", 1, "4")
    assert run.fit() == first.resolve()
    assert_same(tensors(first, 4), whole)


def test_mistakes_are_exceptions(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stepz.*did you mean steps"):
        rqvae.Run.load(STAGE1, {"train.stepz": 3})
    with pytest.raises(BadInput, match="overrides: expected a mapping"):
        rqvae.Run.load(STAGE1, "--train.steps 3")
    with pytest.raises(BadInput, match="expected one of auto, cpu, cuda"):
        rqvae.Run.load(STAGE1).fit(tmp_path / "s", device="tpux")
    with pytest.raises(BadInput, match="config.yaml: no such config file"):
        rqvae.Run.load(tmp_path)
    assert not (tmp_path / "s").exists()


def test_a_stage2_run_loads_from_any_directory_and_after_a_move(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    run = run_of(tree, "two")
    expected = rqvae.load(run).sample(2, steps=2)
    monkeypatch.chdir("/")
    assert torch.equal(rqvae.load(str(run)).sample(2, steps=2), expected)
    newest = only(run / "checkpoints")
    assert torch.equal(rqvae.load(newest).sample(2, steps=2), expected)
    copy = tmp_path / "elsewhere"
    shutil.copytree(tree, copy)
    aside = tree.with_name("aside")
    tree.rename(aside)
    try:
        assert torch.equal(rqvae.load(run_of(copy, "two")).sample(2, steps=2), expected)
        shutil.rmtree(run_of(copy, "one"))
        with pytest.raises(BadInput, match=r"runs/p/one_\S+: no such checkpoint"):
            rqvae.load(run_of(copy, "two"))
    finally:
        aside.rename(tree)


def test_a_checkpoint_and_the_weights_of_a_run_can_be_chosen(tree: Path) -> None:
    run = run_of(tree, "one")
    early, late = (rqvae.load(run / "checkpoints" / f"step_0000000{k}") for k in (2, 4))
    assert not torch.equal(early.encode(images()), late.encode(images()))
    assert torch.equal(rqvae.load(run).encode(images()), late.encode(images()))
    assert torch.equal(rqvae.load(run, weights="0.9").encode(images()), late.encode(images()))
    raw = rqvae.load(run, weights="model")
    saved = tensors(run, 4)
    assert all(torch.equal(v, saved[f"model/stage1:{k}"]) for k, v in raw.stage1.state_dict().items())
    with pytest.raises(BadInput, match=r"expected weights ema_0.9, model, got 0.5"):
        rqvae.load(run, weights="0.5")


def test_device_goes_through_the_backends(tree: Path) -> None:
    pipeline = rqvae.load(run_of(tree, "two"), device="cpu")
    assert pipeline.device == torch.device("cpu") == pipeline.sample(1, steps=1).device
    with pytest.raises(BadInput, match="expected one of auto, cpu, cuda"):
        rqvae.load(run_of(tree, "one"), device="gpu")


def test_grid_is_a_picture() -> None:
    assert rqvae.grid(images(3), columns=2, scale=2).size == (2 * 32 + 2, 2 * 32 + 2)


def test_shipped_names_and_unknown_ones(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    for name in ("maze", "photos"):
        rqvae.load(run_of(tree, "one")).save_pretrained(tmp_path / name)
    expected = rqvae.load(run_of(tree, "one")).reconstruct(images())
    assert torch.equal(rqvae.load("maze").reconstruct(images()), expected)
    with pytest.raises(BadInput, match=r"mase: expected .* a shipped name \(maze, photos\) or a hub id"):
        rqvae.load("mase")
    with pytest.raises(BadInput, match="nowhere/at_all: expected a run or exported folder"):
        rqvae.load(Path("nowhere/at_all"))


def test_a_pipeline_goes_to_the_hub_and_back(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = rqvae.load(run_of(tree, "two"))
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        assert pipeline.push_to_hub("someone/a-model", private=True) == f"{hub.address}/someone/a-model"
        files = set(hub.repositories["someone/a-model"])
        assert {"config.json", "README.md", "stage1/model.safetensors", "stage2/model.safetensors"} <= files
        back = rqvae.Pipeline.from_pretrained("someone/a-model")
        assert torch.equal(back.sample(2, steps=2), pipeline.sample(2, steps=2))
        with pytest.raises(BadInput, match="someone/no-model: .*no such repository .*HF_TOKEN.*by hand"):
            rqvae.load("someone/no-model")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(BadInput, match="someone/other: .*no such repository .*HF_TOKEN") as caught:
            rqvae.load("someone/other")
        assert "hf_wrong" not in str(caught.value)
        with pytest.raises(BadInput, match="someone/other: the hub refused: set HF_TOKEN"):
            pipeline.push_to_hub("someone/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(rqvae.load("someone/a-model").sample(2, steps=2), pipeline.sample(2, steps=2)), "from the cache"
    with pytest.raises(
        BadInput, match="someone/else: .*could not be reached .*HF_HUB_OFFLINE unset.*by hand"
    ) as caught:
        rqvae.load("someone/else")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="hub id: expected owner/name, got 'a/b/c'"):
        pipeline.push_to_hub("a/b/c")


def test_importing_the_package_loads_no_torch() -> None:
    """And the API itself no diffusers, which takes longer than all the rest."""
    code = (
        "import sys, rqvae; assert 'torch' not in sys.modules; assert 'load' in rqvae.__all__; rqvae.load\n"
        "assert not {'diffusers', 'torch_xla'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
