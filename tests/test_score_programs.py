"""What the programs print beside a distance, what their JSON says, what `recon` leaves them, and files for others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lpips
import numpy as np
import pytest
import pytorch_msssim
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import compute_statistics_of_path
from torchvision import transforms

from eval import psnr_ssims
from eval.pytorch_fid import (
    ImageSource,
    Moments,
    frechet_distance,
    write_adm_reference,
    write_image_folder,
    write_image_npz,
)
from eval.pytorch_fid.__main__ import main as fid
from gpu_eval.fid.__main__ import main as adm
from rqvae.errors import BadInput
from rqvae.metrics.extractors import DINOv2
from rqvae.metrics.jackknife import GroupedStatistics, jackknife_frechet
from rqvae.metrics.kid import kernel_distance
from rqvae.metrics.precision_recall import precision_recall
from tests.conftest import ROOT, only
from tests.inception_weights import write_random_inception
from tests.test_fid_programs import PIXELS, folder_of, npz_of, photos, pixel_features

STAGE1 = "configs/debug/stage1.yaml"
FIELDS = {
    "reference", "n", "labels_policy", "cfg_scale", "cfg_interval", "sampler", "steps", "nfe", "seed_rule", "ema",
    "precision", "uint8_rule", "image_format", "versions",
}  # fmt: skip
OF_FEATURES = {"extractor", "weights_sha256", "resize", "scaling"}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def checked(result: dict, fields: set[str]) -> dict:
    """A result with all fields of a protocol, a reference that can be found again, and warnings."""
    assert fields <= result["protocol"].keys()
    assert len(result["protocol"]["reference"]["sha256"]) == 64
    assert result["protocol"]["reference"]["n"] > 0
    assert any("50000" in line for line in result["warnings"])
    return result


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_error_bar_and_further_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = photos(60), photos(80, seed=1)
    sides, out = (npz_of(tmp_path / "a.npz", real), npz_of(tmp_path / "b.npz", fake)), tmp_path / "out.json"
    asked = ("--jackknife", "8", "--fd-infinity", "--kid", "30", "--neighbours", "5")
    assert fid([*map(str, sides), *PIXELS, *asked, "--json", str(out)]) == 0
    found, said = checked(read(out), FIELDS | OF_FEATURES), capsys.readouterr().out
    x, y = (torch.from_numpy(pixel_features(images)) for images in (real, fake))
    groups = GroupedStatistics(6, 8)
    groups.update(y, torch.arange(80))
    expected = jackknife_frechet(groups.parts, x.mean(0), x.T.cov())
    assert found["jackknife"] == pytest.approx(vars(expected), rel=1e-4)
    assert found["jackknife"]["estimate"] == pytest.approx(found["fd_pixels"], rel=1e-9)
    assert found["kid"]["mean"] == pytest.approx(kernel_distance(y, x, size=30).mean, rel=1e-4)
    shares = precision_recall(x, y, k=5)
    assert {k: found["neighbours"][k] for k in shares} == pytest.approx(shares, abs=0.02)
    assert found["fd_infinity"]["sizes"][-1] == 80
    assert f"bias-corrected: {expected.bias_corrected:.2f}" in said
    for line in ("n to infinity", "kid: ", "precision_le: ", "coverage_lt: "):
        assert line in said


def test_scores_of_features_are_refused_to_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(40, 6))
    statistics, features = tmp_path / "s.npz", npz_of(tmp_path / "f.npz", act=x)
    np.savez(statistics, mu=x.mean(0), sigma=np.cov(x.T))
    for arguments, message in (
        ((features, statistics, "--jackknife"), "s.npz: jackknife: expected images or features, got statistics"),
        ((statistics, features, "--kid"), "--kid: "),
        ((features, statistics, "--fd-infinity"), "--fd-infinity: "),
        ((features, features, "--jackknife", "1"), "at least 2 groups, got 1"),
        ((features, features, "--batch-size", "0"), "--batch-size: expected a number of at least 1, got 0"),
        ((features, features, "--device", "tpuu"), "--device: expected a device of this machine, got tpuu"),
        ((features, features, "--extractor-args", "3"), "expected a JSON object"),
        ((features, features, "--json", tmp_path / "f.npz" / "x.json"), "cannot be written"),
        ((photo_file(tmp_path), features, "--resize", "lanczos"), "inception.resize: expected one of tf1, half_pixel"),
        ((photo_file(tmp_path), features, "--scaling", "none"), "inception.scaling: expected one of tf, unit"),
    ):
        assert fid([str(x) for x in arguments]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert message in errors[0]


def photo_file(folder: Path) -> Path:
    return npz_of(folder / "photos.npz", photos(4))


def test_images_that_are_not_balanced_or_compressed_are_warned_of(tmp_path: Path) -> None:
    images, out = photos(40), tmp_path / "out.json"
    uneven = npz_of(tmp_path / "a.npz", images, np.array([0] * 30 + [1] * 10))
    assert fid([str(uneven), str(uneven), *PIXELS, "--json", str(out)]) == 0
    assert any("not balanced: 10 to 30" in line for line in read(out)["warnings"])
    (tmp_path / "jpeg").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "jpeg" / f"{i:03d}.jpg")
    assert fid([str(uneven), str(tmp_path / "jpeg"), *PIXELS, "--json", str(out)]) == 0
    assert any("lossy codec" in line for line in read(out)["warnings"])
    assert read(out)["protocol"]["image_format"] == "jpeg"
    plain = folder_of(images, tmp_path / "png")
    assert psnr_ssims.main([str(plain), str(tmp_path / "jpeg"), "--json", str(out)]) == 0
    assert any("lossy codec" in line for line in checked(read(out), FIELDS)["warnings"])


@pytest.mark.slow
def test_adm_result_says_what_it_is_and_writes_its_reference(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference batch that was written gives the numbers of its images, and pytorch-fid's own reader reads it."""
    real, fake = photos(5), photos(6, seed=1)
    sample = npz_of(tmp_path / "sample.npz", fake, np.arange(6))
    batch, out = tmp_path / "batch.npz", tmp_path / "out.json"
    common = (str(sample), "--weights", str(weights), "--device", "cpu", "--json", str(out))
    first = (str(folder_of(real, tmp_path / "real")), *common, "--save-reference", str(batch), "--jackknife", "3")
    assert adm(list(first)) == 0
    a, said = checked(read(out), FIELDS | OF_FEATURES | {"mode", "k", "arithmetic"}), capsys.readouterr().out
    assert a["jackknife"]["groups"] == 3
    assert "FID, bias-corrected: " in said
    assert adm([str(batch), *common]) == 0
    b = read(out)
    assert (a["distances"]["fid"]["route"], b["distances"]["fid"]["route"]) == ("gram", "gram_1")
    for key in ("fid", "sfid", "precision_le", "recall_le", "inception_score_file_order"):
        assert b[key] == pytest.approx(a[key], rel=1e-8), key
    mu, sigma = compute_statistics_of_path(str(batch), None, 1, 2048, "cpu")
    with np.load(batch) as arrays:
        np.testing.assert_array_equal(arrays["mu"], mu)
        np.testing.assert_array_equal(arrays["arr_0"], real)
        assert sorted(arrays.files) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        assert (arrays["sigma_s"].shape, sigma.shape) == ((2023, 2023), (2048, 2048))


def test_stored_statistics_decide_and_not_the_images(tmp_path: Path, weights: Path) -> None:
    """Published reference batches hold 10 000 images and the statistics of the whole training set."""
    rng = np.random.default_rng(0)
    pooled, spatial = (Moments(rng.random(d), np.diag(rng.random(d) + 0.1)) for d in (2048, 2023))
    batch, out = tmp_path / "batch.npz", tmp_path / "out.json"
    write_adm_reference(batch, photos(4), pooled, spatial)
    features = tmp_path / "features.npz"
    sample = npz_of(tmp_path / "sample.npz", photos(5, seed=1))
    assert adm([str(batch), str(sample), "--weights", str(weights), "--device", "cpu", "--json", str(out)]) == 0
    line = [str(batch), str(sample), "--weights", str(weights), "--save-features", str(features)]
    assert fid(line) == 0
    act = np.load(features)["act"].astype(float)
    centred, variances = (act - act.mean(0)) / (len(act) - 1) ** 0.5, pooled.cov.diagonal()
    nuclear = np.linalg.svd(centred * variances**0.5, compute_uv=False).sum()
    expected = ((act.mean(0) - pooled.mean) ** 2).sum() + (centred**2).sum() + variances.sum() - 2 * nuclear
    assert read(out)["fid"] == pytest.approx(expected, rel=1e-9)


def test_image_files_of_every_kind(tmp_path: Path) -> None:
    """The same images through an array, an npz and a folder; labels as the ADM suite keeps them."""
    images, labels = photos(70), np.arange(70) % 7
    write_image_npz(tmp_path / "a.npz", images, labels)
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], labels)
    source = ImageSource(tmp_path / "a.npz")
    write_image_folder(tmp_path / "folder", source)
    write_image_npz(tmp_path / "b.npz", ImageSource(tmp_path / "folder"))
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["arr_0"], images)
    assert np.asarray(Image.open(tmp_path / "folder" / "000069.png")).tolist() == images[69].tolist()
    for call, message in (
        (lambda: write_image_npz(tmp_path / "c.npz", images / 255), "expected uint8"),
        (lambda: write_image_npz(tmp_path / "c.npz", images, labels[:9]), "expected 70 labels, got"),
        (lambda: write_image_npz(tmp_path / "c.npy", images), "ends in .npz"),
    ):
        with pytest.raises(BadInput, match=message):
            call()
    assert not list(tmp_path.glob("c*"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_score_of_pairs_has_its_convention_in_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the packages give them for the stored pixels, from a folder and an npz."""
    features = torchvision.models.alexnet(weights=None).features.state_dict()
    trunk, out = tmp_path / "trunk.pth", tmp_path / "out.json"
    torch.save({f"features.{key}": value for key, value in features.items()}, trunk)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for parameter, value in zip(theirs.net.parameters(), features.values(), strict=True):
        parameter.data.copy_(value)
    a, b = photos(3, 180), np.clip(photos(3, 180).astype(int) + 9, 0, 255).astype(np.uint8)
    sides = folder_of(a, tmp_path / "a"), npz_of(tmp_path / "b.npz", b)
    line = [
        *map(str, sides),
        "--ms-ssim",
        "--lpips",
        "alex",
        "--json",
        str(out),
        "--processes",
        "2",
        "--batch-size",
        "2",
    ]
    assert psnr_ssims.main([*line, "--trunk-weights", str(trunk)]) == 0
    found = checked(read(out), FIELDS)
    x, y = (torch.from_numpy(side).permute(0, 3, 1, 2) / 255 for side in (a, b))
    with torch.no_grad():
        expected = {
            "lpips_alex_v0.1_u8": float(theirs(2 * y - 1, 2 * x - 1).mean()),
            "ms_ssim_wang_rgb_u8": float(pytorch_msssim.ms_ssim(y.double(), x.double(), data_range=1.0)),
        }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert {"psnr_rgb_u8", "psnr_pooled_rgb_u8", "ssim_wang_rgb_u8"} <= found.keys()
    assert psnr_ssims.main([*line, "--trunk-weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth: no such file; download https" in capsys.readouterr().err.splitlines()[-1]


def test_scores_of_a_folder_that_recon_wrote(tmp_path: Path, cli) -> None:
    """The same PSNR and SSIM from its files, with what it says of them."""
    place = ["--save-dir", tmp_path, "--run-name"]
    line = ["train", STAGE1, *place, "r", "--project", "p", "--train.steps", 1, "--online_eval.every", "null"]
    assert cli(*line, "--pictures.every", "null") == 0
    run, out = only(tmp_path / "p", "r_*"), tmp_path / "out.json"
    assert cli("recon", STAGE1, *place, "recon", "--ckpt", run) == 0
    stated = checked(read(tmp_path / "recon" / "metrics.json"), FIELDS)
    assert psnr_ssims.main([str(tmp_path / "recon"), "--json", str(out)]) == 0
    found = checked(read(out), FIELDS)
    assert found["psnr_rgb_u8"] == pytest.approx(stated["psnr"], abs=1e-6)
    assert found["ssim_wang_rgb_u8"] == pytest.approx(stated["ssim"], abs=1e-6)
    assert found["n"] == stated["n"]
    for key in ("ema", "uint8_rule", "seed_rule", "image_format"):
        assert found["protocol"][key] == stated["protocol"][key], key
    assert "rounded to nearest" in found["protocol"]["uint8_rule"]
    assert found["protocol"]["reference"]["sha256"] == stated["protocol"]["reference"]["sha256"]
    assert cli("recon", STAGE1, *place, "plain", "--ckpt", run, "--no-originals") == 0
    assert not (tmp_path / "plain" / "originals").exists()
    assert read(tmp_path / "plain" / "metrics.json")["protocol"]["reference"]["sha256"] is None


HUBCONF = """
from torch import nn

def dinov2_vitl14(pretrained=True):
    assert not pretrained
    return nn.Sequential(nn.Conv2d(3, 8, 14, 14), nn.GELU(), nn.Flatten(), nn.Linear(2048, 1024))
"""


def test_dinov2_by_class_path_with_random_weights(tmp_path: Path) -> None:
    """A stand-in of the repository: images are prepared as dgm-eval prepares them, and the distance has its name."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 14, 14), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16 * 16, 1024)
    )
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    real, fake = photos(6, 60), photos(7, 90, seed=1)
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        x, y = (
            network(torch.stack([prepare(Image.fromarray(i)) for i in images])).double().numpy()
            for images in (real, fake)
        )
    sides = npz_of(tmp_path / "a.npz", real), npz_of(tmp_path / "b.npz", fake)
    given = {"repository": str(tmp_path), "weights": str(tmp_path / "weights.pth")}
    for name in ("dinov2", "rqvae.metrics.extractors.DINOv2"):
        out = tmp_path / "out.json"
        line = [*map(str, sides), "--extractor", name, "--extractor-args", json.dumps(given), "--json", str(out)]
        assert fid(line) == 0
        result = checked(read(out), FIELDS | OF_FEATURES)
        expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert result["fd_dinov2"] == pytest.approx(expected, rel=1e-5)
        assert (result["protocol"]["extractor"], result["protocol"]["resize"]) == ("dinov2_vitl14", "pil")
    with pytest.raises(BadInput, match="expected a clone of facebookresearch/dinov2"):
        DINOv2(repository=str(tmp_path / "none"), weights=given["weights"]).load()


def test_the_distance_comes_without_models_and_trainers() -> None:
    """At run time, as the import of a program that someone else writes."""
    code = "import sys, eval.pytorch_fid.__main__, eval.psnr_ssims, gpu_eval.fid.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.split(".")[1] for name in done.stdout.split() if name.startswith("rqvae.")}
    assert loaded == {"errors", "files", "lpips_network", "metrics", "randomness", "weight_files"}, "metrics and leaves"


def test_errors_of_the_distance_are_value_errors() -> None:
    for arguments in (
        (np.zeros(3), np.eye(3), np.zeros(3), np.full((3, 3), np.inf)),
        (np.zeros(3), np.eye(4), np.zeros(3), np.eye(3)),
        (torch.zeros(3, dtype=torch.bfloat16), torch.eye(3), torch.zeros(4), torch.eye(4)),
    ):
        with pytest.raises(ValueError, match="expected"):
            frechet_distance(*arguments)


def test_adm_warns_of_its_score_in_file_order_without_labels(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    found = {"inception_score_shuffled_10": 159.0, "inception_score_shuffled_10_std": 4.0}
    found |= {"inception_score_file_order": 41.0, "inception_score_file_order_std": 3.0}
    monkeypatch.setattr("rqvae.metrics.evaluation.FeatureSums.inception_scores", lambda _: found)
    sides, out = [str(npz_of(tmp_path / f"{i}.npz", photos(4, seed=i))) for i in range(2)], tmp_path / "out.json"
    assert adm([*sides, "--weights", str(weights), "--device", "cpu", "--json", str(out)]) == 0
    words = "Inception Score is 41.00 in file order and 159.00 shuffled"
    assert words in capsys.readouterr().err
    assert sum(words in line for line in read(out)["warnings"]) == 1
