"""`python -m rqvae export`: what it writes loads without run, data and config; diffusers' format and back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard

import rqvae
from rqvae.api.exported import Description
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec
from tests.conftest import assert_same, only, tensors
from tests.hub_server import running_hub
from tests.test_api import KL_VAE, ON_LATENTS, STAGE1, STAGE2, images

FOREIGN = """
import torch
from rqvae.models.interfaces import Stage1Encodings, Stage1Model, Stage1ModelOutput


class Gain(Stage1Model):
    \"\"\"One number.

    Args:
        start: of the number.
    \"\"\"

    def __init__(self, *, start: float = 0.5) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(start))

    def encode(self, inputs):
        return Stage1Encodings(inputs.require_img() * self.gain)

    def decode(self, encodings):
        return Stage1ModelOutput(encodings.zs / self.gain)

    def forward(self, inputs):
        return self.decode(self.encode(inputs))

    def latent_shape(self, image_shape):
        return image_shape
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    one = {"train.steps": 4, "checkpoint.every": 2, "online_eval.every": 2}
    stage1 = rqvae.Run.load(STAGE1, one).fit(folder, "one", "p")
    config = {**ON_LATENTS, "stage1_checkpoint": str(stage1)}
    return {"one": stage1, "two": rqvae.Run.load(STAGE2, config).fit(folder, "two", "p")}


def said(capfd: Any) -> str:
    rows = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error: ")]
    assert len(rows) == 1
    return rows[0]


def test_a_generator_loads_without_runs_data_and_config(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli, capfd
) -> None:
    """In a directory of its own, while both runs are away and the data set cannot be made."""
    before = rqvae.load(runs["two"])
    assert cli("export", runs["two"], tmp_path / "out", "--license", "apache-2.0") == 0
    assert "LatentDiffusion, weights ema_0.9 of step 2" in capfd.readouterr().out
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"README.md", "config.json", *(f"{p}/model.safetensors" for p in ("stage1", "connector", "stage2"))}
    shutil.move(tmp_path / "out", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rqvae.img_datasets.photos.SkimagePhotos.__init__", None)
    project = runs["one"].parent
    project.rename(project.with_name("away"))
    try:
        after = rqvae.load("moved")
    finally:
        project.with_name("away").rename(project)
    assert torch.equal(after.sample(3, steps=2, seed=5), before.sample(3, steps=2, seed=5))
    assert torch.equal(after.reconstruct(images()), before.reconstruct(images()))
    assert after.spec == before.spec
    after.save_pretrained("again", licence="apache-2.0")
    again = (Path("again") / "config.json").read_text()
    assert again == (Path("moved") / "config.json").read_text(), "an export of an export is the same"
    assert str(runs["one"].parent) not in again


def test_an_export_samples_by_the_command(runs: dict[str, Path], tmp_path: Path, cli) -> None:
    """The images of the run itself, with what the export says of itself beside them."""
    assert cli("export", runs["two"], tmp_path / "out") == 0
    for name, model in (("run", runs["two"]), ("export", tmp_path / "out")):
        assert cli("sample", model, "--num", 3, "--steps", 2, "--out", tmp_path / f"{name}.npz") == 0
    own, again = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("run", "export"))
    assert np.array_equal(own, again)
    own_facts, facts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "export"))
    keys = ("step", "weights", "stage1_sha256", "nfe")
    assert [facts[key] for key in keys] == [own_facts[key] for key in keys]


def test_the_card_says_what_it_is(runs: dict[str, Path], tmp_path: Path, cli) -> None:
    assert cli("export", runs["one"], tmp_path / "out", "--license", "mit") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "mae-dit")
    rows = [json.loads(row) for row in (runs["one"] / "metrics.jsonl").read_text().splitlines()]
    psnr = [row["val/psnr"] for row in rows if "val/psnr" in row][-1]
    for words in (
        f"| val/psnr | {psnr:.4f} |", "- step: 4", "- weights: ema_0.9", "SkimagePhotos", "of 16 x 16 pixels",
        "import rqvae", "## Limits", "trained by: `",
    ):  # fmt: skip
        assert words in card.text, words


def test_the_card_of_a_checkpoint_has_the_scores_up_to_it(runs: dict[str, Path], tmp_path: Path, cli) -> None:
    for step in (2, 4):
        assert cli("export", runs["one"] / "checkpoints" / f"step_0000000{step}", tmp_path / str(step)) == 0
    found = [json.loads((tmp_path / s / "config.json").read_text())["source"] for s in ("2", "4")]
    rows = [json.loads(row) for row in (runs["one"] / "metrics.jsonl").read_text().splitlines()]
    assert [f["scores"]["val/psnr"] for f in found] == [row["val/psnr"] for row in rows if "val/psnr" in row]
    assert [f["step"] for f in found] == [2, 4]


def test_the_average_is_chosen_by_name(runs: dict[str, Path], tmp_path: Path, cli, capfd) -> None:
    assert cli("export", runs["one"], tmp_path / "raw", "--ema", "model") == 0
    assert "weights model of step 4" in capfd.readouterr().out
    saved, loaded = tensors(runs["one"], 4), rqvae.load(tmp_path / "raw").stage1.state_dict()
    assert_same(loaded, {k: saved[f"model/stage1:{k}"] for k in loaded})
    assert cli("export", runs["one"], tmp_path / "none", "--ema", "0.77") == 2
    assert "expected weights ema_0.9, model, got 0.77" in said(capfd)
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_to_diffusers_and_back_through_the_command(runs: dict[str, Path], tmp_path: Path, cli) -> None:
    ours = rqvae.load(runs["one"])
    assert cli("export", runs["one"], tmp_path / "theirs", "--format", "diffusers") == 0
    theirs: Any = AutoencoderKL.from_pretrained(tmp_path / "theirs", use_safetensors=True)  # type: ignore[attr-defined]
    assert theirs.config.sample_size == 16
    latents = theirs.encode(2 * images() - 1).latent_dist.mode()
    torch.testing.assert_close(ours.encode(images()), latents, rtol=1e-4, atol=1e-5)
    assert cli("export", tmp_path / "theirs", tmp_path / "back") == 0
    back = rqvae.load(tmp_path / "back")
    assert_same(back.stage1.state_dict(), ours.stage1.state_dict())
    assert torch.equal(back.reconstruct(images()), ours.reconstruct(images()))
    wrapped = rqvae.load(tmp_path / "theirs")
    torch.testing.assert_close(wrapped.reconstruct(images()), ours.reconstruct(images()), rtol=1e-4, atol=1e-5)
    wrapped.save_pretrained(tmp_path / "wrapped")
    shutil.rmtree(tmp_path / "theirs")
    alone = rqvae.load(tmp_path / "wrapped")
    assert torch.equal(alone.reconstruct(images()), wrapped.reconstruct(images()))
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "wrapped").rglob("config.json"))


def test_the_autoencoder_of_a_generator_takes_its_scale_along(runs: dict[str, Path], tmp_path: Path, cli) -> None:
    assert cli("export", runs["two"], tmp_path / "out", "--format", "diffusers") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    connector: Any = rqvae.load(runs["two"]).two_stage.connector  # type: ignore[union-attr]
    assert config["latents_mean"] == connector.mean.tolist()
    assert config["latents_std"] == connector.std.tolist()


@pytest.mark.parametrize("form", ["rqvae", "diffusers"])
def test_an_export_is_a_stage1(form: str, runs: dict[str, Path], tmp_path: Path, cli) -> None:
    """The same generator, trained on the run, on the exported folder, or on diffusers' folder by class_path."""
    out = tmp_path / "stage1"
    assert cli("export", runs["one"], out, "--format", form) == 0
    wrapper = {"class_path": "rqvae.models.stage1.diffusers_vae.AutoencoderKLStage1", "init_args": {"source": str(out)}}
    places = {"rqvae": {"stage1": KL_VAE, "stage1_checkpoint": str(out)}, "diffusers": {"stage1": wrapper}}
    run = rqvae.Run.load(STAGE2, {**ON_LATENTS, **places[form]}).fit(tmp_path, "r", "p")
    ours, theirs = rqvae.load(runs["two"]).sample(2, steps=2), rqvae.load(run).sample(2, steps=2)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_foreign_class_is_recorded_by_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli, capfd
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "my_export_parts.py").write_text(FOREIGN)
    config = {"stage1": {"class_path": "my_export_parts.Gain", "init_args": {"start": 0.25}}, "train.steps": 2}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "parts")
        run = rqvae.Run.load(STAGE2, {**config, "stage1_checkpoint": str(stage1_folder(tmp_path / "gain"))}).fit(
            tmp_path, "r", "p"
        )
        before = rqvae.load(run)
        assert cli("export", run, tmp_path / "out") == 0
        assert torch.equal(rqvae.load(tmp_path / "out").sample(2, steps=2), before.sample(2, steps=2))
    del sys.modules["my_export_parts"]
    with pytest.raises(
        BadInput, match=r"config.json: stage1.class_path: expected my_export_parts.Gain to be importable.*PYTHONPATH"
    ):
        rqvae.load(tmp_path / "out")


def stage1_folder(folder: Path) -> Path:
    """An export of the foreign autoencoder, whose pipeline is put together by hand."""
    import my_export_parts  # type: ignore[import-not-found]

    spec = DataSpec((3, 16, 16))
    description = Description(spec, {"stage1": {"class_path": "my_export_parts.Gain"}})
    rqvae.Pipeline(spec, my_export_parts.Gain(start=0.75), None, description).save_pretrained(folder)
    return folder


def test_damage_is_named(runs: dict[str, Path], tmp_path: Path, cli) -> None:
    out = tmp_path / "out"
    assert cli("export", runs["one"], out) == 0
    weights, config = out / "stage1" / "model.safetensors", out / "config.json"
    good, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BadInput, match=r"stage1/model.safetensors: expected sha256 .* damaged"):
        rqvae.load(out)
    weights.unlink()
    with pytest.raises(BadInput, match=r"stage1/model.safetensors: expected the file that config.json lists"):
        rqvae.load(out)
    weights.write_bytes(good)
    for change, expected in (
        (('"width": 16', '"width": 24'), r"model.safetensors: weights of another architecture than KLVAE"),
        (('"width": 16', '"widht": 16'), r"config.json: .*widht.*did you mean width"),
        (('"format_version": 1', '"format_version": 9'), r"config.json: expected format 'mae-dit' version 1, got .*9"),
        (('"num_classes"', '"number"'), r"config.json: data_spec: expected the fields of DataSpec"),
        (("{", "["), r"config.json: expected a JSON object"),
        (("KLVAE", "KLVEA"), r"config.json: stage1.class_path: expected rqvae.models.stage1.kl_vae.KLVEA"),
    ):
        config.write_text(text.replace(*change, 1))
        with pytest.raises(BadInput, match=expected) as caught:
            rqvae.load(out)
        assert "\n" not in str(caught.value)
    (out / "pickle").mkdir()
    (out / "pickle" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(BadInput, match="_class_name: expected one of AutoencoderKL, AutoencoderDC, AutoencoderTiny"):
        rqvae.load(out / "pickle")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["nowhere", "OUT"], "nowhere: expected a run or exported folder, a shipped name"),
        (["RUN", "RUN"], "expected a new or empty folder to export to"),
        (["RUN", "OUT", "--format", "onnx"], "--format"),
        (["RUN", "OUT", "--push-to-hub", "no-owner"], "hub id: expected owner/name, got 'no-owner'"),
        (["PIXELS", "OUT", "--format", "diffusers"], "expected a KLVAE, the only model with a form in diffusers"),
        (["RUN"], "OUT"),
    ],
)
def test_bad_input(line: list[str], expected: str, runs: dict[str, Path], tmp_path: Path, cli, capfd) -> None:
    words = {"RUN": runs["one"], "OUT": tmp_path / "out"}
    if "PIXELS" in line:
        words["PIXELS"] = rqvae.Run.load(STAGE2, {"train.steps": 1}).fit(tmp_path, "r", "p")
    capfd.readouterr()
    assert cli("export", *(words.get(word, word) for word in line)) == 2
    assert expected in said(capfd)
    assert not (tmp_path / "out").exists()


def test_push_to_hub(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli, capfd) -> None:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        assert cli("export", runs["one"], tmp_path / "out", "--push-to-hub", "me/vae", "--private") == 0
        assert f"{hub.address}/me/vae" in capfd.readouterr().out
        assert hub.repositories["me/vae"]["config.json"] == (tmp_path / "out" / "config.json").read_bytes()
        assert cli("export", "me/vae", tmp_path / "copy") == 0
    exported = [only(tmp_path / name / "stage1") for name in ("out", "copy")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
