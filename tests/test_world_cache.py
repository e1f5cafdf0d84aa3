"""World models on cached latents: those of the context come from the cache too, and a stale one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from rqvae.games.collect import collect
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.img_datasets.interfaces import ActionCondition, LabeledImageData, LabeledImageDatasetWrapper, Stage1Encodings
from rqvae.img_datasets.transforms import Identity
from rqvae.models.connectors.scale_shift import ScaleShift
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage2.linear_dit import LinearDiT
from rqvae.models.stage2.world_model import WorldModel
from rqvae.models.two_stage import TwoStage
from tests.conftest import ROOT, only, rows


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    collect("maze-chase", 600, 32, folder)
    return folder


class Frames:
    """A latent source that gives the frame's number, so that the place of each latent can be seen."""

    def read(self, index: int, choice: torch.Tensor) -> Stage1Encodings:
        return Stage1Encodings(torch.full((1, 1, 1), float(index)))


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_latents_of_a_window_are_those_of_its_frames(recording: Path, split: str, padding: bool) -> None:
    data = GameFrames(split, root=str(recording), size=32, history=3, context=True, padding=padding)  # type: ignore[arg-type]
    data.open()
    frames = data.encoded_images()
    assert len(frames) == sum(len(data.episode(k)[0]) for k in range(data.episodes))
    stream = LabeledImageDatasetWrapper(data, Identity(data.spec), {}, 0, shuffle=False, latents=Frames())
    for index in range(0, len(data), max(1, len(data) // 20)):
        sample, stored = stream[index], data[index]
        assert sample.img is None
        assert isinstance(sample.condition, ActionCondition)
        assert sample.condition.cached
        assert torch.equal(frames[int(sample.encodings.zs)].img, stored.img)
        for k, latent in enumerate(sample.condition.context):
            assert torch.equal(frames[int(latent)].img, stored.condition.context[k])
        assert torch.equal(sample.condition.actions, stored.condition.actions)
        assert torch.equal(sample.condition.mask, stored.condition.mask)


def test_cached_context_goes_through_the_connector_once() -> None:
    torch.manual_seed(0)
    vae = KLVAE(latent_channels=4, width=8, multipliers=[1, 1, 2], blocks=1, norm_groups=4)
    connector = ScaleShift(mean=[1.0, 2.0, 3.0, 4.0], std=[0.5, 1.0, 2.0, 1.5])
    spec = GameFrames("train", root="nowhere", size=32, history=2, context=True).spec
    world = WorldModel((4, 8, 8), spec, backbone=lambda s, d: LinearDiT(s, d, depth=1, width=32, heads=2))
    model = TwoStage(vae, connector, world, spec.image_shape)
    frames, image = torch.rand(2, 2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    actions, mask = torch.zeros(2, 2).long(), torch.ones(2, 2).bool()
    with torch.no_grad():
        latents = vae.encode(LabeledImageData(img=frames.flatten(0, 1))).zs.unflatten(0, (2, 2))
        target = vae.encode(LabeledImageData(img=image))
    from_images = model.prepare(LabeledImageData(image, ActionCondition(frames, actions, mask, 5)))
    cached = ActionCondition(latents, actions, mask, 5, cached=True)
    from_cache = model.prepare(LabeledImageData(condition=cached, encodings=target))
    torch.testing.assert_close(from_cache.condition.context, from_images.condition.context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(from_cache.encodings.zs, from_images.encodings.zs, atol=1e-5, rtol=1e-5)
    assert (from_cache.condition.encoded, from_cache.condition.cached) == (True, False)


@pytest.mark.slow
def test_training_on_a_cache_is_training_on_frames(recording: Path, tmp_path: Path, cli, capfd) -> None:
    """Losses within 1e-5; another autoencoder, another recording, two caches and pixels are refused in one line."""
    common = {"train": {"steps": 3, "log_every": 1}, "logging": {"wandb": "disabled"}, "pictures": {"every": None}}
    config = yaml.safe_load((ROOT / "configs/maze_chase/world_model_klvae.yaml").read_text()) | common
    config["data"] |= {"batch_size": 8, "workers": 0}
    config["data"]["dataset"]["init_args"]["root"] = str(recording)
    config["stage1"]["init_args"] |= {"width": 8, "multipliers": [1, 1, 1], "norm_groups": 4}
    config["stage2"]["init_args"]["backbone"]["init_args"] |= {"width": 32, "depth": 1}
    config["connector"]["init_args"] = {"mean": [0.0] * 4, "std": [1.0] * 4}
    first = {k: config[k] for k in ("data", "stage1", *common)} | {"online_eval": {"every": None}}
    for name, tree in (("vae", first), ("world", config)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for seed in (0, 1):
        line = ["train", tmp_path / "vae.yaml", "--save-dir", tmp_path, "--project", f"vae{seed}"]
        assert cli(*line, "--train.seed", seed, "--train.steps", 1) == 0
    vae, other = only(tmp_path / "vae0"), only(tmp_path / "vae1")
    cache = tmp_path / "cache"
    assert cli("cache-latents", tmp_path / "vae.yaml", cache, "--ckpt", vae) == 0
    frames = json.loads((cache / "manifest.json").read_text())["splits"]["train"]["samples"]
    line = ["train", tmp_path / "world.yaml", "--save-dir", tmp_path, "--stage1_checkpoint", vae]
    named = ["--data.dataset.init_args.vae", cache]
    assert cli(*line, "--project", "frames") == 0
    assert cli(*line, "--project", "cached", *named) == 0
    losses = [[row["train/loss_total"] for row in rows(only(tmp_path / name))] for name in ("frames", "cached")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] > 0
    dataset = GameFrames("train", root=str(recording), size=32)
    dataset.open()
    assert frames == len(dataset)
    capfd.readouterr()
    compares = ["--stage2.init_args.loss_space", "both"]
    assert cli(*line, "--project", "refused", *named, *compares) == 2
    assert "data.dataset vae: expected null for a Stage2 that noises or compares pixels" in capfd.readouterr().err
    refused = {
        "expected latents of the Stage1 weights": ["--stage1_checkpoint", other],
        "expected null, as data.dataset vae names": ["--data.latents", cache],
        "expected null for a Stage2 that noises or compares pixels": ["--stage2.init_args.workflow", "pixel"],
    }
    for words, more in refused.items():
        assert cli(*line, "--project", "refused", *named, *more) == 2
        assert words in capfd.readouterr().err
    collect("maze-chase", 600, 32, tmp_path / "other", seed=5)
    assert cli(*line, "--project", "refused", *named, "--data.dataset.init_args.root", tmp_path / "other") == 2
    assert "expected latents of the data GameFrames:train:frames" in capfd.readouterr().err


def test_a_cache_is_no_key_of_an_autoencoder(tmp_path: Path, cli, capfd) -> None:
    line = ["train", ROOT / "configs/maze_chase/klvae_f4.yaml", "--save-dir", tmp_path]
    assert cli(*line, "--data.dataset.init_args.vae", tmp_path) == 2
    assert "expected null for Stage1" in capfd.readouterr().err
