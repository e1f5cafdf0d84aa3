"""Scores while training: the images they are of, the numbers they are, and that they leave no trace in the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision

from eval.pytorch_fid.__main__ import main as pytorch_fid
from rqvae import backends
from rqvae.configuration import read
from rqvae.img_datasets.interfaces import LabeledImageData
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.metrics.feature_files import read_features
from rqvae.metrics.frechet import frechet
from rqvae.metrics.perceptual import LPIPSScore
from rqvae.metrics.reconstruction import to_uint8
from rqvae.trainers.evaluation_trainer import load_evaluated
from rqvae.trainers.online_images import MadeBatch
from rqvae.trainers.online_scores import OnlineScores, row_names
from rqvae.trainers.settings import OnlineEvalSettings
from tests.conftest import assert_same, finish, only, rows, start, tensors
from tests.extractors import Projections
from tests.inception_weights import write_random_inception

STAGES = {1: "configs/debug/stage1.yaml", 2: "configs/debug/stage2.yaml"}
DISTANCE = {1: "rfid", 2: "gfid"}
KEY = "eval/fd_projections"


def words(stage: int, save_dir: Path, *more: object, steps: int = 2) -> list[object]:
    """A run that is scored at its last step, by features that need no weights."""
    return [
        "train", STAGES[stage], "--save-dir", save_dir, "--project", "p", "--run-name", "r", "--fresh",
        "--train.steps", steps, "--pictures.every", "null", "--online_eval.every", steps,
        "--online_eval.metrics", f"[{DISTANCE[stage]}]", "--online_eval.images", 0, "--online_eval.batch_size", 5,
        "--online_eval.extractor", "tests.extractors.Projections", *more,
    ]  # fmt: skip


def report(run: Path, step: int = 2) -> dict:
    return json.loads((run / "eval" / f"step_{step:08d}.json").read_text())


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """By SciPy's matrix square root."""
    a, b = np.cov(x.astype(float), rowvar=False), np.cov(y.astype(float), rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return float(((x.astype(float).mean(0) - y.astype(float).mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def project(images_u8: torch.Tensor) -> np.ndarray:
    return Projections()(images_u8).pooled.numpy()


def originals(split: str) -> torch.Tensor:
    """Every image of the split as it is stored; the debug data have their size already."""
    dataset, _ = read([STAGES[1]]).instantiate().data.make(split)
    dataset.open()
    return torch.stack([dataset[i].img for i in range(len(dataset))])


def hashes_option(folder: Path) -> list[object]:
    folder.mkdir(parents=True)
    return ["--online_eval.extractor.init_args.hashes", folder]


def test_rfid_is_the_distance_of_the_averages_reconstructions(tmp_path: Path, cli) -> None:
    assert cli(*words(1, tmp_path, "--online_eval.metrics", "[rfid, psnr]")) == 0
    folder = only(tmp_path / "p", "r_*")
    images = originals("val")
    stage1 = read([STAGES[1]]).instantiate().stage1
    load_evaluated(stage1, "stage1", folder)
    with torch.no_grad():
        recon = stage1.eval().get_recon_imgs(stage1(LabeledImageData(img=images.float() / 255)).xs_recon)
    expected = distance(project(to_uint8(recon)), project(images))
    assert rows(folder)[-1][KEY] == pytest.approx(expected, rel=1e-4)  # convolutions of batches of 5 and of 24
    found = report(folder)
    assert found["scores"].keys() == {KEY, "val/psnr"}
    assert found["scores"][KEY] == rows(folder)[-1][KEY]
    assert found["protocol"]["n"] == found["protocol"]["reference"]["n"] == len(images)
    assert found["protocol"]["conventions"] == {"psnr": "psnr_rgb_u8"}


def test_gfid_is_of_the_images_that_sample_gives(tmp_path: Path, cli) -> None:
    more = ["--online_eval.images", 33, "--online_eval.save_features", "true"]
    assert cli(*words(2, tmp_path, *more)) == 0
    run = only(tmp_path / "p", "r_*")
    out = tmp_path / "samples.npz"
    assert cli("sample", run, "--num", 33, "--batch-size", 5, "--seed", 0, "--out", out) == 0
    images = torch.from_numpy(np.load(out)["arr_0"]).permute(0, 3, 1, 2)
    features = read_features(run / "eval" / "step_00000002_features.npz").features
    np.testing.assert_array_equal(features, project(images))
    assert rows(run)[-1][KEY] == pytest.approx(distance(project(images), project(originals("val"))), rel=1e-6)
    stored = read_features(run / "eval" / "step_00000002.npz")
    np.testing.assert_allclose(stored.pooled.cov, np.cov(features.astype(float), rowvar=False), rtol=1e-9)
    fields = report(run)["protocol"]
    assert (fields["steps"], fields["sampler"], fields["ema"]) == (4, "euler", "ema_0.9")
    reference, offline = only(tmp_path / "p" / "references"), tmp_path / "offline.json"
    arguments = [reference, out, "--extractor", "tests.extractors.Projections", "--json", offline]
    assert pytorch_fid([str(a) for a in arguments]) == 0
    found = json.loads(offline.read_text())
    assert found["fd_projections"] == pytest.approx(rows(run)[-1][KEY], rel=1e-9)
    assert fields["nfe"] == 4, "Euler: one a step"
    for key in ("steps", "sampler", "nfe", "ema", "uint8_rule", "cfg_scale"):
        assert found["protocol"][key] == fields[key], key
    kept = run / "eval" / "step_00000002_features.npz"
    assert pytorch_fid([str(reference), str(kept), "--jackknife", "5", "--json", str(offline)]) == 0
    bar = json.loads(offline.read_text())["jackknife"]
    assert bar["estimate"] == pytest.approx(rows(run)[-1][KEY], rel=1e-9)
    assert bar["standard_error"] > 0
    assert fields["extractor"] == "projections-0"
    assert any("33 images" in note for note in report(run)["warnings"])


@pytest.mark.parametrize("stage", [1, 2])
def test_training_is_the_same_with_and_without(stage: int, tmp_path: Path, cli) -> None:
    often = ["--online_eval.every", 2, "--train.log_every", 1]
    assert cli(*words(stage, tmp_path / "on", *often, steps=5)) == 0
    assert cli(*words(stage, tmp_path / "off", *often, "--do_online_eval", "False", steps=5)) == 0
    on, off = (only(tmp_path / name / "p", "r_*") for name in ("on", "off"))
    assert_same(tensors(on, 5), tensors(off, 5))
    assert sum(KEY in row for row in rows(on)) == 3
    assert not any(KEY in row for row in rows(off))
    assert not (off / "eval").exists()
    assert not (tmp_path / "off" / "p" / "references").exists()


@pytest.mark.parametrize(
    ("stage", "world"),
    [pytest.param(1, 2, marks=pytest.mark.slow), (2, 2), pytest.param(2, 4, marks=pytest.mark.slow)],
    ids=lambda x: str(x),
)
def test_world_size_changes_neither_images_nor_statistics(stage: int, world: int, tmp_path: Path, cli) -> None:
    name = {1: "autoencoder", 2: "generator"}[stage]
    still = [f"--updates.{name}.lr", 1e-30, "--data.workers", 0]  # weights that do not depend on the order of sums
    one, many = tmp_path / "one", tmp_path / "many"
    assert cli(*words(stage, one, *still, *hashes_option(one / "hashes"))) == 0
    process = start(*words(stage, many, *still, *hashes_option(many / "hashes"), "--world-size", world))
    code, errors = finish(process)
    assert code == 0, errors
    a, b = only(one / "p", "r_*"), only(many / "p", "r_*")
    seen = [{line for f in (x / "hashes").iterdir() for line in f.read_text().split()} for x in (one, many)]
    assert seen[0] <= seen[1], "images that only fill up a batch may be seen, too"
    assert len(seen[0]) >= 40
    x, y = (read_features(run / "eval" / "step_00000002.npz") for run in (a, b))
    assert x.n == y.n == 24
    np.testing.assert_allclose(x.pooled.mean, y.pooled.mean, rtol=1e-10)
    np.testing.assert_allclose(x.pooled.cov, y.pooled.cov, rtol=1e-10, atol=1e-10 * np.abs(x.pooled.cov).max())
    assert rows(a)[-1][KEY] == pytest.approx(rows(b)[-1][KEY], rel=1e-9)


def test_scores_are_of_the_average_that_is_named(tmp_path: Path, cli) -> None:
    scores = {}
    for decay in (0.0, 0.9999):
        more = ["--ema.decays", f"[{decay}]", "--ema.warmup", "false"]
        assert cli(*words(2, tmp_path / str(decay), *more, steps=8)) == 0
        run = only(tmp_path / str(decay) / "p", "r_*")
        scores[decay] = rows(run)[-1][KEY]
        assert report(run, 8)["protocol"]["ema"] == f"ema_{decay:g}"
    assert abs(scores[0.0] - scores[0.9999]) > 1e-3 * scores[0.0]


def test_reference_of_the_split_is_computed_once(tmp_path: Path, cli) -> None:
    for name in ("first", "second"):
        assert cli(*words(2, tmp_path, *hashes_option(tmp_path / name))) == 0
    first, second = ((tmp_path / name / "0.txt").read_text().split() for name in ("first", "second"))
    assert first[-25:] == second[-25:], "24 samples in batches of 5"
    assert (len(first), len(second)) == (50, 25)
    assert len(list((tmp_path / "p" / "references").iterdir())) == 1


def test_features_of_a_run_are_a_reference(tmp_path: Path, cli) -> None:
    assert cli(*words(2, tmp_path / "a", "--online_eval.save_features", "true")) == 0
    features = only(tmp_path / "a" / "p", "r_*") / "eval" / "step_00000002_features.npz"
    assert cli(*words(2, tmp_path / "b", "--fid_gt_act_path", features)) == 0
    run = only(tmp_path / "b" / "p", "r_*")
    assert abs(rows(run)[-1][KEY]) < 1e-9 * np.trace(read_features(features).pooled.cov)
    assert report(run)["protocol"]["reference"]["path"] == str(features)
    assert not (tmp_path / "b" / "p" / "references").exists()


def refused(cli, capfd, *line: object) -> str:
    """The one line of a command that ends with 2."""
    capfd.readouterr()
    assert cli(*line) == 2
    said = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def test_references_that_do_not_fit_are_refused(tmp_path: Path, cli, capfd) -> None:
    made = tmp_path / "train.npz"
    line = ["make-reference", STAGES[2], made, "--split", "train", "--extractor", "tests.extractors.Projections"]
    assert cli(*line) == 0
    given = ["--fid_gt_act_path", made]
    assert cli(*words(2, tmp_path / "good", *given)) == 0
    larger = refused(cli, capfd, *words(2, tmp_path / "s", *given, "--data.dataset.init_args.size", 24))
    assert f"online_eval.reference: {made}: expected images [3, 24, 24]" in larger
    assert "got [3, 16, 16]" in larger
    crop = '{"class_path": "rqvae.img_datasets.transforms.Identity"}'
    assert "transforms.Identity()" in refused(
        cli, capfd, *words(2, tmp_path / "s", *given, "--data.val_transform", crop)
    )
    seed = ["--online_eval.extractor.init_args.seed", 1]
    assert "one extractor, got projections-0 and projections-1" in refused(
        cli, capfd, *words(2, tmp_path / "s", *given, *seed)
    )
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, act=np.random.default_rng(0).normal(size=(40, 9)))
    line = refused(cli, capfd, *words(2, tmp_path / "s", "--fid_gt_act_path", foreign))
    assert "expected 8 features, got 9" in line
    line = refused(cli, capfd, *words(2, tmp_path / "s", "--fid_gt_act_path", tmp_path / "nowhere.npz"))
    assert "nowhere.npz: no such file" in line
    assert not list((tmp_path / "s").rglob("config.yaml")), "nothing is left behind"


def test_a_foreign_reference_is_taken_with_a_warning(tmp_path: Path, cli) -> None:
    foreign, x = tmp_path / "foreign.npz", np.random.default_rng(0).normal(size=(40, 8))
    np.savez(foreign, mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    assert cli(*words(2, tmp_path, "--fid_gt_act_path", foreign)) == 0
    notes = " ".join(report(only(tmp_path / "p", "r_*"))["warnings"])
    assert "does not say by which transform" in notes
    assert "does not say with which extractor" in notes


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        (
            1,
            ["--online_eval.metrics", "[gfid]"],
            "expected scores of Stage1 (psnr, ssim, lpips, rfid, sfid, is), got gfid",
        ),
        (2, ["--online_eval.metrics", "[psnr, gfid]"], "expected scores of Stage2 (gfid, sfid, is), got psnr"),
        (2, ["--online_eval.metrics", "[gfid, is]"], "expected the extractor inception, got that of fd_projections"),
        (2, ["--online_eval.every", "null", "--fid_gt_act_path", "x.npz"], "expected online_eval.every to be set"),
        (2, ["--online_eval.images", 1], "online_eval.images: expected 0 or at least 2, got 1"),
        (2, ["--online_eval.metrics", "[gfid, gfid]"], "expected one or more different ones"),
        (2, ["--online_eval.batch_size", 0], "online_eval.batch_size: expected at least 1, got 0"),
        (2, ["--online_eval.extractor", "incepton"], "online_eval.extractor"),
    ],
)
def test_scores_that_do_not_exist_are_refused(stage, more, said, tmp_path: Path, cli, capfd) -> None:
    assert said in refused(cli, capfd, *words(stage, tmp_path / "s", *more))
    assert not (tmp_path / "s").exists()


class Few(SkimagePhotos):
    """Photos with as many validation images as a test wants."""

    def __init__(self, split: str, *, val: int, **arguments) -> None:
        super().__init__(split, **arguments)
        self.val, self.opened = val, False

    def open(self) -> None:
        super().open()
        self.opened = True

    def __len__(self) -> int:
        return self.val if self.opened and self.split == "val" else super().__len__()


@pytest.mark.parametrize(
    ("stage", "val", "more", "said"),
    [
        (1, 1, [], "online_eval.images: expected at least 2 images of the validation split for rfid, it has 1"),
        (1, 0, ["--online_eval.metrics", "[psnr]"], "at least 1 images of the validation split for psnr, it has 0"),
        (2, 1, ["--online_eval.images", 4], "online_eval.reference: expected a file, the validation split has 1 image"),
    ],
)
def test_too_small_a_split_is_told_before_the_first_step(
    stage: int, val: int, more: list, said: str, tmp_path: Path, cli, capfd
) -> None:
    data = {"class_path": "tests.test_online_eval.Few", "init_args": {"val": val, "size": 16, "patches_per_photo": 16}}
    line = words(stage, tmp_path / "s", "--data.dataset", json.dumps(data), *more)
    assert said in refused(cli, capfd, *line)
    assert not (tmp_path / "s").exists()


def test_missing_inception_weights_stop_the_run_at_load(tmp_path: Path, cli, capfd) -> None:
    place = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    inception = json.dumps(
        {"class_path": "rqvae.metrics.extractors.InceptionExtractor", "init_args": {"weights": str(place)}}
    )
    line = refused(cli, capfd, *words(2, tmp_path / "s", "--online_eval.extractor", inception))
    for part in ("online_eval.extractor", str(place), "https://github.com/mseitzer", "sha256 6726825d", "random-vgg16"):
        assert part in line
    assert not list((tmp_path / "s").rglob("config.yaml"))
    off = words(2, tmp_path / "off", "--online_eval.extractor", inception, "--do_online_eval", "False")
    assert cli(*off) == 0, "an evaluation that is switched off asks for no weights"


SMALL = [f for d in ("debug", "maze_chase", "channels", "pathology") for f in sorted(Path("configs", d).glob("*.yaml"))]


@pytest.mark.parametrize("file", SMALL, ids=str)
def test_configs_without_downloads_ask_for_scores_that_need_no_weights(file: Path) -> None:
    configuration = read([str(file)])
    settings = configuration.resolved["online_eval"]
    if configuration.stage == 1:
        assert settings["every"]
        assert sorted(settings["metrics"]) == ["psnr", "ssim"]
    else:
        assert settings["every"] is None, "off until it is asked for"


def test_names_of_rows_tell_the_network() -> None:
    names = {
        x: row_names(OnlineEvalSettings(metrics=["gfid"], extractor=x))["gfid"] for x in ("inception", "random-vgg16")
    }
    assert names == {"inception": "eval/gfid", "random-vgg16": "eval/fd_random_vgg16"}
    assert row_names(OnlineEvalSettings(metrics=["is", "psnr"])) == {
        "is": "eval/inception_score_shuffled_10",
        "psnr": "val/psnr",
    }


def test_inception_gives_fid_and_inception_score(tmp_path: Path, cli) -> None:
    weights = write_random_inception(tmp_path / "inception.pth")
    reference, x = tmp_path / "act.npz", np.random.default_rng(0).random((6, 2048))
    np.savez(reference, act=x)
    extractor = "rqvae.metrics.extractors.InceptionExtractor"
    more = ["--online_eval.extractor", extractor, "--online_eval.extractor.init_args.weights", weights]
    more += ["--online_eval.images", 10, "--online_eval.metrics", "[gfid, is]", "--online_eval.save_features", "true"]
    assert cli(*words(2, tmp_path, *more, "--fid_gt_act_path", reference, steps=1)) == 0
    run = only(tmp_path / "p", "r_*")
    made = read_features(run / "eval" / "step_00000001_features.npz").features.astype(float)
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, made))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(0) - made.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * nuclear
    assert rows(run)[-1]["eval/gfid"] == pytest.approx(expected, rel=1e-8)
    assert 1 <= rows(run)[-1]["eval/inception_score_shuffled_10"] < 1008
    found = report(run, 1)
    assert found["distances"]["gfid"]["route"] == "gram"
    assert found["protocol"]["weights_sha256"]


@pytest.mark.slow
def test_sfid_is_of_the_spatial_features(tmp_path: Path, cli) -> None:
    weights = write_random_inception(tmp_path / "inception.pth")
    made = tmp_path / "val.npz"
    small = ["--data.dataset.init_args.patches_per_photo", 4]
    assert cli("make-reference", STAGES[1], made, "--split", "val", "--weights", weights, *small) == 0
    more = ["--online_eval.extractor", "rqvae.metrics.extractors.InceptionExtractor"]
    more += ["--online_eval.extractor.init_args.weights", weights, "--fid_gt_act_path", made, *small]
    assert cli(*words(1, tmp_path, *more, "--online_eval.metrics", "[rfid, sfid]", steps=1)) == 0
    run = only(tmp_path / "p", "r_*")
    a, b = read_features(made), read_features(run / "eval" / "step_00000001.npz")
    assert a.spatial.mean.shape == b.spatial.mean.shape == (2023,)
    expected = frechet(a.spatial.mean, a.spatial.cov, b.spatial.mean, b.spatial.cov).value
    assert rows(run)[-1]["eval/sfid"] == pytest.approx(expected, rel=1e-6)
    assert rows(run)[-1]["eval/sfid"] != rows(run)[-1]["eval/rfid"]


def test_lpips_is_the_packages_mean(tmp_path: Path, cli) -> None:
    torch.manual_seed(0)
    features = torchvision.models.alexnet(weights=None).features.state_dict()
    trunk = tmp_path / "trunk.pth"
    torch.save({f"features.{key}": value for key, value in features.items()}, trunk)
    more = ["--online_eval.metrics", "[lpips]", "--online_eval.lpips_weights", trunk]
    more += ["--data.dataset.init_args.size", 32, "--online_eval.images", 10]
    assert cli(*words(1, tmp_path, *more)) == 0
    run = only(tmp_path / "p", "r_*")
    again = read([run / "config.yaml"]).instantiate()
    load_evaluated(again.stage1, "stage1", run)
    dataset, _ = again.data.make("val")
    dataset.open()
    images = torch.stack([dataset[i].img for i in range(10)]).float() / 255
    with torch.no_grad():
        recon = again.stage1.eval().get_recon_imgs(again.stage1(LabeledImageData(img=images)).xs_recon)
    expected = LPIPSScore(trunk_weights=str(trunk)).load()(to_uint8(recon) / 255, images).mean()
    assert rows(run)[-1]["val/lpips_alex"] == pytest.approx(float(expected), rel=1e-4)
    assert not (run / "eval").exists(), "no features, no statistics"


@pytest.mark.slow
def test_random_vgg16_is_no_fid(tmp_path: Path, cli) -> None:
    more = ["--online_eval.extractor", "random-vgg16", "--online_eval.images", 4, "--online_eval.batch_size", 2]
    assert cli(*words(1, tmp_path, *more, steps=1)) == 0
    row = rows(only(tmp_path / "p", "r_*"))[-1]
    assert row["eval/fd_random_vgg16"] > 0
    assert "eval/rfid" not in row


class Broken:
    """Three images, one of them not finite."""

    distance = "gfid"

    def count(self) -> int:
        return 3

    def batches(self):
        images = torch.rand(3, 3, 16, 16)
        images[1, 0, 0, 0] = float("nan")
        yield MadeBatch(images, torch.arange(3), torch.ones(3, dtype=torch.bool))

    def labels(self) -> None:
        return None

    def facts(self) -> dict:
        return {}


def test_images_that_are_not_finite_have_no_score(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from rqvae.metrics.feature_files import write_features
    from rqvae.trainers.references import OnlineReference, originals

    reference = tmp_path / "reference.npz"
    write_features(reference, np.random.default_rng(0).normal(size=(20, 8)), {})
    backend, data = backends.create("cpu"), read([STAGES[2]]).instantiate().data
    extractor = Projections().load()
    compared = OnlineReference(originals(data, "val", backend, 4), extractor, str(reference))
    compared.check()
    settings = OnlineEvalSettings(metrics=["gfid"], extractor=extractor)
    scores = OnlineScores(settings, Broken(), backend, "model", "fp32", extractor, compared)
    run = SimpleNamespace(folder=tmp_path / "run", clock=SimpleNamespace(step=2, images=16))
    assert np.isnan(scores(run)[KEY])
    found = report(tmp_path / "run")
    assert found["scores"] == {KEY: None}
    assert "1 images are not finite: there is no score" in found["warnings"]
