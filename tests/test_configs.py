"""Every shipped config builds and trains; the debug configs' losses are known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from rqvae.configuration import read
from rqvae.games.collect import collect
from rqvae.run import Stage1Run
from rqvae.trainers.assembly import check
from rqvae.trainers.stage2_trainer import make_two_stage
from tests.conftest import ROOT, only, rows, tensors

CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.usefixtures("small_hub_vae")


def eighth(config: dict, frames: Path) -> dict:
    """The config at an eighth of its width on embedded photos, from step 0 of every update, weight decay 0.

    A model that continues frames has them from the recording in `frames`. A generator draws a picture at the end, by
    its own solver and guidance in 2 steps.
    """
    small = {
        "train": {"steps": 4, "log_every": 1, "precision": "fp32", "accumulate": 1},
        "data": {
            "dataset": {
                "class_path": "rqvae.img_datasets.photos.SkimagePhotos",
                "init_args": {"size": 32, "patches_per_photo": 8},
            },
            "batch_size": 8,
            "workers": 0,
        },
        "logging": {"tensorboard": False, "wandb": "disabled", "progress": False},
        "pictures": {"every": None},
        "online_eval": {"every": None},
    }
    for second_spelling in ("num_train_epochs", "report_to"):
        config.pop(second_spelling, None)
    dataset = config["data"]["dataset"]
    masks = dataset["class_path"].startswith(("rqvae.img_datasets.pathology.", "rqvae.img_datasets.tissue."))
    if masks:
        drawn = {"size": 32, "images": 64, "unlabelled": 0.25, "p_cond": 0.5}
        small["data"]["dataset"] = {"class_path": "rqvae.img_datasets.tissue.ProceduralTissue", "init_args": drawn}
        config["data"].pop("train_transform", None)
    if dataset["class_path"].endswith("MaskPictures"):  # its autoencoder takes nothing but masks
        small["data"].pop("dataset")
        dataset["init_args"]["masks"]["init_args"] |= {"size": 32, "images": 64}
    config["data"] |= small.pop("data")
    if dataset["init_args"].get("context"):
        collect("maze-chase", 400, 32, frames)
        recorded = {"root": str(frames), "size": 32, "num_actions": 5}
        config["data"]["dataset"] = {**dataset, "init_args": dataset["init_args"] | recorded}
    config |= {k: {**config.get(k, {}), **v} for k, v in small.items()}
    for update in config.get("updates", {}).values():
        update |= {"weight_decay": 0.0, "schedule": {"class_path": "rqvae.trainers.schedules.Constant"}, "lr": 1e-3}
    stage1 = config["stage1"]["init_args"]
    if "width" in stage1:
        stage1 |= {"width": max(8, stage1["width"] // 8), "norm_groups": 4}
    if "gan" in config:
        config["gan"] |= {"disc_start": 1}
        config["gan"]["discriminator"]["init_args"] = {"width": 8, "layers": 1}
    config.pop("lpips", None)
    if "stage2" in config:
        backbone = config["stage2"]["init_args"]["backbone"]["init_args"]
        narrow(backbone)
        generator = config["stage2"]["init_args"]
        generator |= {"drop_condition": 0 if masks else 0.5, "sampler": {**generator.get("sampler", {}), "steps": 2}}
        config["pictures"] |= {"every": 4, "images": 1, "frames": 2}
    return config


def narrow(backbone: dict) -> None:
    """The arguments of a backbone at an eighth of its width, at most 4 deep."""
    if "multipliers" not in backbone:
        size = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
        depth, width, heads = size[backbone["size"]] if "size" in backbone else (2, backbone["width"], 2)
        backbone |= {"depth": min(depth, 4), "width": max(8, width // 8 // heads * heads), "heads": heads}
        backbone.pop("size", None)
        return
    backbone |= {"width": max(8, backbone["width"] // 8), "norm_groups": 4}
    backbone |= {"heads": 2} if "heads" in backbone else {}
    if "token_width" in backbone:
        backbone |= {"token_width": max(8, backbone["token_width"] // 8), "depth": min(backbone["depth"], 4)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_trains_and_moves_every_tensor(path: Path, tmp_path: Path, cli) -> None:
    config = eighth(yaml.safe_load(path.read_text()), tmp_path / "frames")
    config["checkpoint"] = {"every": 1, "keep_last": 9}
    if "stage2" in config and config["stage1"]["class_path"].endswith("KLVAE"):
        stage1 = {k: v for k, v in config.items() if k in ("data", "stage1", "logging")}
        stage1 |= {"train": {"steps": 1}, "pictures": {"every": None}}
        (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(stage1))
        assert cli("train", tmp_path / "stage1.yaml", "--save-dir", tmp_path / "s1", "--project", "p") == 0
        config["stage1_checkpoint"] = str(only(tmp_path / "s1" / "p"))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    assert cli("train", tmp_path / "small.yaml", "--save-dir", tmp_path / "s", "--project", "p") == 0
    run = only(tmp_path / "s" / "p")
    first, last = tensors(run, 1), tensors(run, 4)
    trained = trainable(tmp_path / "small.yaml")
    assert trained <= last.keys()
    still = [k for k in trained if torch.equal(first[k], last[k])]
    assert not still, still
    drawn = [path.suffix for path in (run / "samples").iterdir()] if "stage2" in config else []
    assert (".png" in drawn) == ("stage2" in config)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in CONFIGS if "lpips:" in p.read_text()], ids=lambda p: p.stem)
def test_lpips_of_a_config_is_in_its_loss(path: Path, tmp_path: Path, cli) -> None:
    """By its own network and weight, on a random trunk in the place of the one that cannot be shipped."""
    torchvision = pytest.importorskip("torchvision")
    given = yaml.safe_load(path.read_text())
    lpips = {**given["lpips"], "trunk_weights": str(tmp_path / "trunk.pth")}
    net = {"vgg": "vgg16", "alex": "alexnet"}[lpips.get("net", "vgg")]
    trunk = getattr(torchvision.models, net)(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in trunk.items()}, tmp_path / "trunk.pth")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(eighth(given, tmp_path / "frames") | {"lpips": lpips}))
    line = ["train", tmp_path / "small.yaml", "--save-dir", tmp_path / "s", "--project", "p", "--train.steps", 1]
    line += ["--gan.disc_start", 9] if "gan" in given else []
    assert cli(*line) == 0
    (row,) = rows(only(tmp_path / "s" / "p"))
    parts = row["train/loss_recon"] + row["train/loss_latent"] + lpips["weight"] * row["train/loss_lpips"]
    assert row["train/loss_lpips"] > 0
    assert row["train/loss_total"] == pytest.approx(parts, rel=1e-5), "before the GAN begins"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_passes_its_checks_as_it_is(path: Path) -> None:
    check(read([path]).for_checks(), world_size=1)


def trainable(config: Path) -> set[str]:
    """`model/PART:NAME` of every parameter that is to be trained."""
    run = read([config]).instantiate()
    if isinstance(run, Stage1Run):
        parts = {"stage1": run.stage1} | ({"discriminator": run.gan.discriminator} if run.gan else {})
    else:
        parts = {"stage2": make_two_stage(run).stage2}
    return {f"model/{part}:{name}" for part, module in parts.items() for name, _ in module.named_parameters()}


@pytest.mark.parametrize("name", ["stage1", "stage1_gan", "stage2"])
def test_golden_losses(name: str, tmp_path: Path, cli) -> None:
    """Changes that are not meant to change what is computed leave these numbers alone (GOLDEN=write renews them)."""
    assert cli("train", f"configs/debug/{name}.yaml", "--save-dir", tmp_path, "--project", "p", "--run-name", "r") == 0
    found = rows(only(tmp_path / "p"))
    losses = {k: [row[k] for row in found] for k in found[0] if k.startswith("train/loss")}
    file = GOLDEN / f"{name}.json"
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(losses, indent=1) + "\n")
    expected = json.loads(file.read_text())
    assert losses.keys() == expected.keys()
    for key, values in expected.items():
        assert losses[key][0] == pytest.approx(values[0], rel=1e-4), key
        # a GAN amplifies rounding: other processors agree to 1e-2 after 20 steps
        assert losses[key] == pytest.approx(values, rel=2e-2, abs=2e-4), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_dry_run_of_every_config(path: Path, tmp_path: Path, cli, capfd) -> None:
    assert cli("train", path, "--dry-run", "--json", tmp_path / "facts.json", "--save-dir", tmp_path / "s") == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    last = list(facts["shapes"].values())[-1]
    assert last == facts["shapes"]["image"] or "logits" in facts["shapes"]
    printed = capfd.readouterr().out
    for part in facts["gflops_forward"]:
        assert f"{facts['parameters'][part]['total']:,}" in printed, part
    assert not (tmp_path / "s").exists()


def test_dry_run_of_dit_xl_2_says_what_the_paper_says(tmp_path: Path, cli) -> None:
    """675 M parameters and 118.6 G multiply-adds at 32 x 32 latents (Peebles & Xie 2023, tables 1 and 4)."""
    line = ["train", "configs/imagenet256/stage2/dit_xl_1.yaml", "--dry-run", "--json", tmp_path / "facts.json"]
    patch = "--stage2.init_args.backbone.init_args.patch"
    f8 = ["--stage1.init_args.multipliers", "[1,2,4,4]", "--stage1.init_args.latent_channels", 4, patch, 2]
    assert cli(*line, *f8) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["shapes"]["latent"] == [4, 32, 32]
    assert facts["gflops_forward"]["stage2"] / 2 == pytest.approx(118.6, abs=0.1)
    assert facts["parameters"]["stage2"]["total"] == pytest.approx(675e6, rel=2e-3)
    assert facts["parameters"]["stage1"]["trainable"] == 0
