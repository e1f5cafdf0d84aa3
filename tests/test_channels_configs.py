"""The shipped experiments on channels: four of a kind differ in one thing, and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rqvae.configuration import read
from rqvae.reports.run_files import flatten
from tests.conftest import assert_same, only, tensors
from tests.test_channels_run import shards

CLI = Callable[..., int]
FOLDER = Path("configs/channels")
ARMS = {"baseline": "none", "observe": "none", "nudge": "scale_mul", "recycle": "recycle"}
KINDS = ("sdxl", "klvae_photos", "klvae_maze")


def resolved(arm: str, kind: str) -> dict[str, Any]:
    return flatten(read([FOLDER / f"{arm}_{kind}.yaml"]).resolved)


@pytest.mark.parametrize("kind", KINDS)
def test_four_of_a_kind_differ_in_tracking_and_intervention_alone(kind: str) -> None:
    arms = {arm: resolved(arm, kind) for arm in ARMS}
    for arm, strategy in ARMS.items():
        assert arms[arm]["intervention.strategy"] == strategy
        assert arms[arm]["tracking.enabled"] == (arm != "baseline")
        different = {k for k in arms[arm] if arms[arm][k] != arms["baseline"][k]}
        assert all(key.startswith(("tracking.", "intervention.")) for key in different)
    assert {path.name for path in FOLDER.glob("*.yaml")} == {
        "cifar10_test.yaml", *(f"{arm}_{kind}.yaml" for arm in ARMS for kind in KINDS)
    }  # fmt: skip


def cifar(folder: Path, count: int = 16) -> Path:
    from datasets import Dataset

    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "test"):
        columns = {"img": [Image.fromarray(image) for image in pixels], "label": [i % 10 for i in range(count)]}
        Dataset.from_dict(columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_sdxl_layers_from_a_folder_and_from_random_weights(cli: CLI, tmp_path: Path) -> None:
    """The classes and layers of the SDXL VAE with few channels: baseline and observe end in the same weights."""
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **kinds).save_pretrained(tmp_path / "vae")
    short = ["--data.dataset.init_args.dataset_name", cifar(tmp_path / "data"), "--data.batch_size", 2]
    short += ["--data.workers", 0, "--tracking.every", 2, "--report_to", "none", "--online_eval.every", "null"]
    place = ["--backend", "cpu", "--save-dir", tmp_path / "s", "--pictures.every", "null"]
    runs = {}
    for arm in ("baseline", "observe"):
        more = ["--project", arm, "--run-name", "r", "--stage1.init_args.source", tmp_path / "vae"]
        assert cli("train", FOLDER / f"{arm}_sdxl.yaml", *short, *place, *more) == 0
        runs[arm] = only(tmp_path / "s" / arm)
    observed = {k: v for k, v in tensors(runs["observe"], 8).items() if not k.startswith("callbacks/")}
    assert_same(tensors(runs["baseline"], 8), observed)
    assert not (runs["baseline"] / "channels").exists()
    names = [row["name"] for row in json.loads((runs["observe"] / "channels" / "layers.json").read_text())["layers"]]
    assert len(names) == 52  # all of the SDXL VAE's GroupNorms
    assert (shards(runs["observe"])["counts"] == 1).all()
    random = {"class_path": "rqvae.models.stage1.untrained_autoencoder_kl.UntrainedAutoencoderKL"}
    init = {"block_out_channels": [8, 8, 16, 16], "norm_groups": 4}
    more = ["--project", "random", "--run-name", "r", "--stage1", json.dumps({**random, "init_args": init})]
    assert cli("train", FOLDER / "recycle_sdxl.yaml", *short, *place, *more) == 0
    assert (only(tmp_path / "s" / "random") / "final_model" / "vae" / "config.json").exists()


def test_klvae_on_photos_and_on_the_maze(cli: CLI, tmp_path: Path) -> None:
    assert cli("collect", "maze-chase", "--frames", 600, "--size", 32, "--out", tmp_path / "frames") == 0
    short = ["--train.steps", 4, "--tracking.every", 2, "--data.batch_size", 2, "--data.workers", 0]
    short += ["--online_eval.every", "null", "--pictures.every", "null", "--backend", "cpu", "--save-dir", tmp_path]
    maze = ["--data.dataset.init_args.root", tmp_path / "frames"]
    for arm, kind, more in (("nudge", "klvae_photos", []), ("recycle", "klvae_maze", maze)):
        name = ["--project", kind, "--run-name", "r"]
        assert cli("train", FOLDER / f"{arm}_{kind}.yaml", *short, *name, *more) == 0
        assert shards(only(tmp_path / kind))["step"].tolist() == [2, 4]
