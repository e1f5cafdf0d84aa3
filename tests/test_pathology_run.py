"""The tissue configs by the commands that a user gives: traces, pictures, resume, ranks, XLA, conversion."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from rqvae.callbacks.trace import FILE
from rqvae.img_datasets.class_draws import cutoffs
from rqvae.metrics.images import ImageSource
from tests.conftest import assert_same, finish, largest_difference, only, rows, start, tensors, without_times
from tests.xla_job import environment

SHORT = "configs/pathology/short_test.yaml"
EXACT = ["--train.precision", "fp64", "--debug", "false", "--pictures.every", "null"]
ORIGINAL: dict[str, dict[str, Any]] = {
    "unet": {
        "image_size": 512,
        "dim": 256,
        "num_classes": 5,
        "dim_mults": [1, 2, 4],
        "channels": 4,
        "resnet_block_groups": 2,
        "block_per_layer": 2,
    },
    "dm": {
        "data_folder": "../labeled-data",
        "timesteps": 1000,
        "sampling_timesteps": 250,
        "batch_size": 4,
        "lr": 0.0001,
        "train_num_steps": 2,
        "save_sample_every": 2,
        "gradient_accumulate_every": 3,
        "save_milestone_every": 1000,
        "save_loss_every": 2,
        "num_samples": 4,
        "num_workers": 16,
        "results_folder": "./logs/short_test",
        "milestone": None,
        "extra_data_path": "../unconditional-data",
        "debug": True,
    },
}
"""The configuration that the original's log prints, but for accumulation, which there is 1."""


def command(save_dir: Path, *more: object, config: str = SHORT) -> list[object]:
    return ["train", config, "--save-dir", save_dir, "--project", "p", "--run-name", "r", "--backend", "cpu", *more]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def test_short_test_says_what_went_through(tmp_path: Path, cli, capfd) -> None:
    assert cli(*command(tmp_path)) == 0
    errors = capfd.readouterr().err
    run = only(tmp_path / "p")
    found = lines(run)
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)
    for step in (1, 2):
        stages = [line["stage"] for line in found if line["step"] == step]
        assert stages == ["loaded"] * 4 + ["image"] * 4 + ["embedding"] * 3 + ["diffusion", "loss"]
    console = [line.partition(" debug ")[2] for line in errors.splitlines() if "rqvae.callbacks.trace" in line]
    assert [json.loads(message) for message in console] == found
    images = [line for line in found if line["stage"] == "image"]
    for line in images:
        img, mask = line["img"], line["mask"]
        assert (img["shape"], img["dtype"], img["device"]) == ([3, 32, 32], "float32", "cpu")
        assert 0 <= img["range"][0] < img["mean"] < img["range"][1] <= 1
        assert (mask["shape"], mask["dtype"], sum(mask["counts"])) == ([32, 32], "int64", 1024)
        assert line["has_mask"] == (mask["unique"] != [5])
    files = [line for line in found if line["stage"] == "loaded"]
    for file, line in zip(files, images, strict=True):
        img, mask = file["img"], file["mask"]
        assert (file["sample_id"], img["shape"], img["dtype"]) == (line["sample_id"], [32, 32, 3], "uint8")
        assert [img["range"][0] / 255, img["range"][1] / 255] == pytest.approx(line["img"]["range"]), "turned, not cut"
        assert (mask["shape"], mask["dtype"]) == ([32, 32], "uint8")
        assert (file["slot"] == 0) == (not line["has_mask"])
        if file["slot"]:
            assert file["slot"] - 1 in mask["unique"], "an image of the class that was drawn"
            assert (mask["unique"], mask["counts"]) == (line["mask"]["unique"], line["mask"]["counts"])
    embedding = next(line for line in found if line.get("class") == "MaskDistributionEmbedding")
    assert (embedding["table"], embedding["output"]["shape"]) == ([6, 64], [4, 64])
    for shares, line in zip(embedding["class_distribution"], images[:4], strict=True):
        counts = dict(zip(line["mask"]["unique"], line["mask"]["counts"], strict=True))
        assert shares == [counts.get(k, 0) / 1024 for k in range(6)]
    diffusion = next(line for line in found if line["stage"] == "diffusion")
    assert all(diffusion[name]["shape"] == [4, 12, 16, 16] for name in ("latent", "prediction", "target"))
    assert len(diffusion["timesteps"]) == 4
    assert all(0 <= t <= 1 for t in diffusion["timesteps"])
    losses = [line["loss_total"] for line in found if line["stage"] == "loss"]
    assert losses == pytest.approx([row["train/loss_total"] for row in rows(run)])
    edges = [round(edge, 6) for edge in cutoffs(0.5, 5).tolist()]
    assert f"train: draws by p_cond 0.5, cutoffs {edges}" in errors
    assert [f"{row['train/lr']:.1e}" for row in rows(run)] == ["8.1e-05", "4.0e-10"]
    for name in ("images", "masks", "samples"):
        assert np.array(Image.open(run / "samples" / f"{name}_00000002.png")).std() > 10


def test_nothing_is_traced_unless_asked_for(tmp_path: Path, cli) -> None:
    """The same numbers without it, and no file."""
    assert cli(*command(tmp_path / "with")) == 0
    assert cli(*command(tmp_path / "without", "--debug", "false")) == 0
    a, b = only(tmp_path / "with" / "p"), only(tmp_path / "without" / "p")
    assert not (b / FILE).exists()
    assert_same(tensors(a, 2), tensors(b, 2))


def test_a_resumed_run_goes_on_with_its_one_cycle(tmp_path: Path, cli) -> None:
    """Stopped after 4 of 8 steps: rates, draws, averages and weights as undisturbed; rates as torch's OneCycleLR."""
    eight = ["--train.steps", 8, "--debug", "false", "--ema.every", 3]
    assert cli(*command(tmp_path / "whole", *eight, "--checkpoint.keep_last", 9)) == 0
    whole = only(tmp_path / "whole" / "p")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = only(tmp_path / "again" / "p")
    (again / "FINISHED").unlink()
    for step in range(5, 9):
        shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
    assert cli(*command(tmp_path / "again", *eight, "--checkpoint.keep_last", 9)) == 0
    assert_same(tensors(whole, 8), tensors(again, 8))
    assert without_times(whole) == without_times(again)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=8, cycle_momentum=False)
    for row in rows(again):
        assert row["train/lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if row["step"] < 8:
            schedule.step()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, cli) -> None:
    code, errors = finish(start(*command(tmp_path / "two", *EXACT, "--world-size", 2)))
    assert code == 0, errors
    assert cli(*command(tmp_path / "one", *EXACT)) == 0
    one, two = only(tmp_path / "one" / "p"), only(tmp_path / "two" / "p")
    assert largest_difference(tensors(one, 2), tensors(two, 2)) < 1e-9


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch_xla is not installed")
def test_xla_equals_cpu(tmp_path: Path, cli) -> None:
    line = command(tmp_path / "xla", *EXACT)
    line[line.index("cpu")] = "xla"
    code, errors = finish(start(*line, env=environment()), timeout=280)
    assert code == 0, errors
    assert cli(*command(tmp_path / "cpu", *EXACT)) == 0
    xla, cpu = only(tmp_path / "xla" / "p"), only(tmp_path / "cpu" / "p")
    assert largest_difference(tensors(xla, 2), tensors(cpu, 2)) < 1e-9


def converted(tmp_path: Path, cli: Any, *more: object, **changes: Any) -> tuple[int, Path]:
    sections = {part: {k: changes.get(k, v) for k, v in keys.items()} for part, keys in ORIGINAL.items()}
    (tmp_path / "dm.yaml").write_text(yaml.safe_dump(sections))
    return cli("convert-config", tmp_path / "dm.yaml", tmp_path / "out.yaml", *more), tmp_path / "out.yaml"


def test_every_key_of_the_original_is_heard(tmp_path: Path, cli, capfd) -> None:
    """Each key but those that may have one value only is changed, and the config, or the command, changes with it."""
    code, out = converted(tmp_path, cli)
    first = (yaml.safe_load(out.read_text()), capfd.readouterr().out)
    assert code == 0
    assert first[0]["data"]["batch_size"] == 12
    assert first[0]["train"] == {"steps": 2, "accumulate": 3, "log_every": 2}
    assert f"python -m rqvae train {out} --save-dir logs --project short_test" in first[1]
    other = {"dim_mults": "1 2", "data_folder": "a", "results_folder": "b/c", "extra_data_path": None, "debug": False}
    for key in [*ORIGINAL["unet"], *ORIGINAL["dm"]]:
        if key in ("channels", "timesteps", "milestone"):
            continue
        out.unlink()
        value = {**ORIGINAL["unet"], **ORIGINAL["dm"]}[key]
        changed = other[key] if key in other else 2 * value
        assert converted(tmp_path, cli, **{key: changed})[0] == 0
        assert (yaml.safe_load(out.read_text()), capfd.readouterr().out) != first, key


@pytest.mark.parametrize(("legacy", "count"), [(True, "172,101,124"), (False, "")])
@pytest.mark.usefixtures("small_hub_vae")
def test_a_converted_config_passes_a_dry_run(legacy: bool, count: str, tmp_path: Path, cli, capfd) -> None:
    code, out = converted(tmp_path, cli, *(["--legacy"] if legacy else []))
    assert code == 0
    assert cli("train", out, "--dry-run", "--save-dir", tmp_path / "s") == 0
    assert count in capfd.readouterr().out
    with (tmp_path / "dm.yaml").open("a") as file:
        file.write(f"legacy: {str(legacy).lower()}\n")
    assert cli("convert-config", tmp_path / "dm.yaml", tmp_path / "again.yaml") == 0
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == yaml.safe_load(out.read_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 3}, r"unet.channels: expected 4 \(it is now the latent of stage1\), got 3"),
        ({"timesteps": 500}, r"dm.timesteps: expected 1000 \(times are continuous now: stage2.path\), got 500"),
        ({"milestone": 7}, r"dm.milestone: expected null \(it is now `train --resume-ckpt RUN`"),
        ({"dim_mults": "1 a"}, r"unet.dim_mults: expected integers >= 1, got \[1, 'a'\]"),
        ({"lr": 0}, "dm.lr: expected a number > 0, got 0"),
        ({"batch_size": True}, "dm.batch_size: expected an integer >= 1, got True"),
        ({"data_folder": None}, "dm.data_folder: expected a folder, got None"),
        ({"debug": "yes"}, "dm.debug: expected true or false, got 'yes'"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], words: str, tmp_path: Path, cli, capfd) -> None:
    assert converted(tmp_path, cli, **changes)[0] == 2
    errors = capfd.readouterr().err.strip()
    assert "\n" not in errors
    assert re.search(words, errors), errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dm: {data_folder: a, learning_rate: 1}\nunet: {}", "dm.learning_rate: expected a key of the original"),
        ("dm: {data_folder: a, batchsize: 1}\nunet: {}", "(batch_size), got batchsize"),
        ("dm: {}", "expected the sections unet and dm, got dm"),
        ("dm: {data_folder: a}\nunet: {}\nlegacy: 1", "legacy: expected true or false, got 1"),
        ("dm: {data_folder: a}\nunet: {}\nother: 1", "and legacy, alone, got other"),
        ("[1", "expected a YAML file"),
    ],
)
def test_configs_that_are_not_the_originals(text: str, words: str, tmp_path: Path, cli, capfd) -> None:
    (tmp_path / "dm.yaml").write_text(text)
    assert cli("convert-config", tmp_path / "dm.yaml", tmp_path / "out.yaml") == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "out.yaml").exists()


def write_folder(folder: Path) -> list[object]:
    """24 labelled images with two or three classes each and 6 without masks; options that train on them."""
    (folder / "labelled").mkdir(parents=True)
    (folder / "more").mkdir()
    for i in range(30):
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.save(folder / ("labelled" if i < 24 else "more") / f"{i:02d}.jpg")
        if i < 24:
            mask = rng.permutation(5)[:3][rng.integers(0, 3, (4, 4))].repeat(8, 0).repeat(8, 1)
            Image.fromarray(mask.astype(np.uint8)).save(folder / "labelled" / f"{i:02d}_mask.png")
    arguments = {"data_folder": str(folder / "labelled"), "unlabelled": str(folder / "more")}
    dataset = {
        "class_path": "rqvae.img_datasets.pathology.Pathology",
        "init_args": arguments | {"size": 32, "num_classes": 5},
    }
    return ["--data.dataset", json.dumps(dataset)]


def test_a_folder_of_ones_own_trains(tmp_path: Path, cli, capfd) -> None:
    """Labelled and unlabelled together; then masks of one's own are sampled, and bad ones are told in a line."""
    own = write_folder(tmp_path / "data")
    assert cli(*command(tmp_path, *own)) == 0
    assert "train: 28 images, 6 unlabelled, class counts" in capfd.readouterr().err
    run, out = only(tmp_path / "p"), tmp_path / "out"
    found = [line for line in lines(run) if line["stage"] == "image"]
    assert all(line["mask"]["unique"] == [5] for line in found if "/more/" in line["path"])
    given = ["--masks", tmp_path / "data" / "labelled", "--backend", "cpu"]
    assert cli("sample", run, "--num", 3, "--out", out, *given) == 0
    assert sorted(path.name for path in out.rglob("*.png")) == sorted([f"{i:06d}.png" for i in range(3)] * 2)
    assert json.loads((out / "provenance.json").read_text())["masks"][0] == "00_mask.png"
    assert len(ImageSource(out)) == 3, "masks are scored by nothing"
    assert cli("sample", run, "--num", 3, "--out", tmp_path / "none", "--backend", "cpu") == 2
    assert "--masks: expected a PNG or a folder of masks, the model is on masks, got none" in capfd.readouterr().err
    first = tmp_path / "data" / "labelled" / "00_mask.png"
    Image.new("L", (32, 32), 9).save(first)
    assert cli(*command(tmp_path / "bad", *own)) == 2
    assert f"{first}: expected class numbers below 5 (num_classes), got 9" in capfd.readouterr().err
    Image.new("L", (16, 32), 1).save(first)
    assert cli("sample", run, "--num", 3, "--out", tmp_path / "small", *given) == 2
    assert "expected a mask of 32 x 32, got 32 x 16" in capfd.readouterr().err
