"""The programs `eval.pytorch_fid`, `eval.psnr_ssims` and `gpu_eval.fid`, and the files that they read and write."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eval import psnr_ssims
from eval.pytorch_fid import (
    Moments,
    StreamingStatistics,
    frechet_distance,
    read_features,
    write_features,
    write_statistics,
)
from eval.pytorch_fid.__main__ import main as fid
from gpu_eval.fid.__main__ import main as adm
from rqvae.errors import BadInput
from rqvae.metrics.evaluation import FeatureSums
from rqvae.metrics.extractors import Extractor, Features, InceptionExtractor
from rqvae.metrics.images import ImageSource
from rqvae.metrics.inception_score import InceptionScore
from rqvae.metrics.protocol import cautions, cautions_of_order
from tests.inception_weights import write_random_inception


class Pixels(Extractor):
    """An extractor of a user's own: mean and deviation of each channel."""

    name = "fd_pixels"
    dim = 6

    def load(self) -> Pixels:
        return self

    def forward(self, images_bchw_u8: torch.Tensor) -> Features:
        x = images_bchw_u8.float().flatten(2)
        return Features(torch.cat([x.mean(2), x.std(2)], 1))

    def identity(self) -> dict[str, str]:
        return {"extractor": "pixels", "weights_sha256": "0", "resize": "none", "scaling": "none"}


PIXELS = ("--extractor", f"{__name__}.Pixels")


def photos(count: int, side: int = 48, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 512 - side, (count, 2))
    return np.stack([data.astronaut()[i : i + side, j : j + side] for i, j in corners])


def folder_of(images: np.ndarray, path: Path) -> Path:
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return path


def npz_of(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> Path:
    np.savez(path, *arrays, **named)
    return path


def pixel_features(images: np.ndarray) -> np.ndarray:
    x = images.reshape(len(images), -1, 3).astype(np.float64)
    return np.concatenate([x.mean(1), x.std(1, ddof=1)], 1)


def test_folder_npz_features_and_statistics_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = photos(30), photos(40, seed=1)
    left = folder_of(a, tmp_path / "a")
    right = npz_of(tmp_path / "b.npz", b, np.arange(40))
    written = tmp_path / "s.npz", tmp_path / "f.npz"
    saving = ("--save-statistics", str(written[0]), "--save-features", str(written[1]))
    assert fid([str(left), str(right), *PIXELS, "--json", str(tmp_path / "r.json"), *saving]) == 0
    x, y = pixel_features(a), pixel_features(b)
    expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["fd_pixels"] == pytest.approx(expected, rel=1e-5)
    assert result["distance"]["route"] == "cholesky_1"
    assert result["protocol"]["reference"]["n"] == 30
    assert result["protocol"]["n"] == 40
    assert len(result["protocol"]["reference"]["sha256"]) == 64
    assert "fd_pixels" in capsys.readouterr().out
    theirs = np.load(written[0])  # the keys that pytorch-fid reads
    np.testing.assert_allclose(theirs["sigma"], np.cov(y.T), rtol=1e-4, atol=1e-3)
    save_file({k: theirs[k] for k in ("mu", "sigma")}, tmp_path / "s.safetensors")
    feats = npz_of(tmp_path / "kid.npz", feats=y)
    for side in (*written, tmp_path / "s.safetensors", feats):
        capsys.readouterr()
        assert fid([str(left), str(side), *PIXELS]) == 0
        assert float(capsys.readouterr().out.split(": ")[1]) == pytest.approx(expected, rel=1e-4)


def test_bad_input_of_eval_pytorch_fid_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = folder_of(photos(8), tmp_path / "good")
    mixed = folder_of(photos(3), tmp_path / "mixed")
    Image.fromarray(photos(1, 50)[0]).save(mixed / "z.png")
    (tmp_path / "empty").mkdir()
    broken = folder_of(photos(2), tmp_path / "broken")
    (broken / "zz.png").write_bytes(b"no image")
    whole = npz_of(tmp_path / "whole.npz", photos(20))
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(whole.read_bytes()[:-3000])
    (tmp_path / "edm.pkl").write_bytes(b"\x80")
    write_features(tmp_path / "other.npz", np.random.rand(9, 6), {"extractor": "pixels", "resize": "tf1"})
    write_features(tmp_path / "wide.npz", np.random.rand(9, 7), {"extractor": "pixels"})
    cases = {
        "empty": "expected images .*found none",
        "mixed": r"z.png: expected images of one size, \(48, 48\) as of 000.png, got \(50, 50\)",
        "broken": "zz.png: expected an image",
        "absent": "no such file",
        "truncated.npz": "expected a complete npz",
        "edm.pkl": "pickles run code",
        "other.npz": "expected features of one resize, got none and tf1",
        "wide.npz": "expected features of one length, got 6 and 7",
        str(npz_of(tmp_path / "key.npz", images=photos(2))): "expected the key arr_0 .*found images",
        str(npz_of(tmp_path / "float.npz", photos(2) / 255)): r"arr_0: expected uint8 .*got float64",
        str(npz_of(tmp_path / "object.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))): "arrays of numbers",
        str(npz_of(tmp_path / "half.npz", mu=np.zeros(6))): "expected .* and None",
        str(npz_of(tmp_path / "nan.npz", act=np.full((9, 6), np.nan))): "row 0 has NaN",
        str(folder_of(photos(1), tmp_path / "one")): "at least 2 images, got 1",
    }
    for name, message in cases.items():
        assert fid([str(good), str(tmp_path / name), *PIXELS]) == 2, name
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, name
        with pytest.raises(BadInput, match=message):
            raise BadInput(lines[0])


def test_statistics_say_how_they_were_made(tmp_path: Path) -> None:
    statistics = StreamingStatistics(3).update(np.random.default_rng(0).normal(size=(9, 3)))
    pooled = Moments(statistics.mean.numpy(), statistics.cov.numpy())
    write_statistics(tmp_path / "s.npz", pooled, 9, {"resize": "tf1"}, pooled)
    read = read_features(tmp_path / "s.npz")
    assert (read.n, read.protocol) == (9, {"resize": "tf1"})
    assert read.spatial is not None
    np.testing.assert_array_equal(read.spatial.cov, pooled.cov)
    with pytest.raises(BadInput, match="ends in .npz"):
        write_features(tmp_path / "f.pkl", np.zeros((2, 2)), {})


def test_an_npz_is_streamed_and_shared_by_ranks(tmp_path: Path) -> None:
    images = photos(23)
    for path in (npz_of(tmp_path / "a.npz", images), tmp_path / "c.npz"):
        if not path.exists():
            np.savez_compressed(path, images)
        source = ImageSource(path)
        seen = {}
        for rank in range(3):
            for batch, positions in source.batches(4, rank, 3):
                seen |= dict(zip(positions.tolist(), batch, strict=True))
        assert sorted(seen) == list(range(23))
        np.testing.assert_array_equal(torch.stack([seen[i] for i in range(23)]).permute(0, 2, 3, 1), images)
        assert source.labels() is None
    assert ImageSource(npz_of(tmp_path / "l.npz", images, np.arange(23))).labels().tolist() == list(range(23))


def scores_in(order: np.ndarray, seed: int, classes: int = 100) -> dict[str, float]:
    """Both Inception Scores of sharp predictions, each of the class that `order` (N,) says."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(order), classes, generator=draw)
    logits[torch.arange(len(order)), torch.from_numpy(order)] += 8 * torch.rand(len(order), generator=draw)
    found: dict[str, float] = {}
    shuffled = InceptionScore.shuffled(len(order), classes=classes)
    for name, score in (
        ("shuffled_10", shuffled),
        ("file_order", InceptionScore.in_file_order(len(order), 5000, classes)),
    ):
        score.update(logits, torch.arange(len(order)))
        found[f"inception_score_{name}"], found[f"inception_score_{name}_std"] = score.result()
    return found


def test_file_order_scores_of_sorted_images_are_warned_of_without_labels() -> None:
    by_class = np.arange(100).repeat(200)  # 20,000: each file-order split has a quarter of the classes
    said = cautions_of_order(scores_in(by_class, 0))
    assert len(said) == 1
    assert re.fullmatch(r"Inception Score is \d+\.\d+ in file order and \d+\.\d+ shuffled: .*", said[0])
    for seed in range(3):
        mixed = np.random.default_rng(seed).permutation(by_class)
        assert cautions_of_order(scores_in(mixed, seed)) == []
    assert cautions_of_order(scores_in(by_class[::5], 0)) == [], "4000 images are one split: there is no order"
    assert cautions_of_order({"inception_score_file_order": 1.0, "inception_score_file_order_std": 0.0}) == []


@pytest.mark.parametrize(
    ("shuffled", "std", "warned"),
    [
        (159.0, 4.0, True),  # published samples in the order of their classes have 41 in file order
        (44.0, 0.5, False),  # 7 % lower: splits of other sizes do that to 1000 classes
        (60.0, 60.0, False),  # within five standard errors of so few images
    ],
)
def test_file_order_is_much_lower_beyond_noise_and_size_of_splits(shuffled: float, std: float, warned: bool) -> None:
    scores = {"inception_score_shuffled_10": shuffled, "inception_score_shuffled_10_std": std}
    assert bool(cautions_of_order(scores | {"inception_score_file_order": 41.0})) is warned


def test_warnings_of_samples() -> None:
    sorted_labels, shuffled = (
        np.arange(1000).repeat(50),
        np.random.default_rng(0).permutation(np.arange(1000).repeat(50)),
    )
    assert any("sorted by class (100 of 1000" in line for line in cautions(50_000, sorted_labels))
    assert cautions(50_000, shuffled, 50_000) == []
    assert "FID is biased" in cautions(49_999)[0]
    uneven = np.concatenate([shuffled, np.zeros(500, np.int64)])
    assert any("not balanced: 50 to 550" in line for line in cautions(50_500, uneven))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_adm_suite_restated(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its formulas in NumPy on the same features: IS in file order, FID and sFID by the nuclear norm, P and R."""
    real, fake, seen = photos(4), photos(11, seed=1), []
    forward = InceptionExtractor.forward
    monkeypatch.setattr(InceptionExtractor, "forward", lambda *x: seen.append(forward(*x)) or seen[-1])
    files = [npz_of(tmp_path / f"{i}.npz", x, np.arange(len(x)) % 5) for i, x in enumerate((real, fake))]
    out = tmp_path / "out.json"
    common = ("--weights", str(weights), "--device", "cpu", "--json", str(out))
    assert adm([str(files[0]), str(files[1]), *common, "--mode", "strict"]) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    labels = [line.split(":")[0] for line in text.splitlines()]
    assert labels == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    a, b = seen
    for key, x, y in (("fid", a.pooled, b.pooled), ("sfid", a.spatial, b.spatial)):
        assert result[key] == pytest.approx(nuclear(x.double().numpy(), y.double().numpy()), rel=1e-6)
        assert result["distances"][key]["route"] == "gram"
    p = b.logits.double().softmax(1).numpy()
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert result["inception_score_file_order"] == pytest.approx(score, rel=1e-6)
    distance = torch.cdist(a.pooled.double(), b.pooled.double()).numpy()
    radius = torch.cdist(a.pooled.double(), a.pooled.double()).sort(1).values[:, 3:4].numpy()
    assert result["precision_le"] == pytest.approx((distance <= radius).any(0).mean())
    assert result["protocol"]["resize"] == "tf1"
    for key in ("labels_policy", "cfg_scale", "sampler", "steps", "seed_rule", "ema", "precision", "uint8_rule"):
        assert key in result["protocol"], key
    assert (result["protocol"]["reference"]["n"], result["protocol"]["n"]) == (4, 11)
    assert any("published values have 50000" in line for line in result["warnings"])
    assert len(result["protocol"]["sample_sha256"]) == 64


def nuclear(x: np.ndarray, y: np.ndarray) -> float:
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace)


def test_bad_input_of_the_adm_suite_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = npz_of(tmp_path / "images.npz", photos(4))
    mu_only = npz_of(tmp_path / "mu.npz", photos(4), mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    for arguments, message in (
        ((mu_only, images), "expected mu_s and sigma_s"),
        ((images, images, "--weights", tmp_path / "none.pth"), "none.pth: no such file; download https"),
        ((tmp_path / "none.npz", images), "none.npz: no such file"),
    ):
        assert adm([str(x) for x in arguments]) == 2
        assert message in capsys.readouterr().err


def test_sums_of_ranks_are_counted() -> None:
    extractor = Pixels()
    sums = FeatureSums(6, 9, inception=False)
    sums.update(extractor(torch.from_numpy(photos(8)).permute(0, 3, 1, 2)), torch.arange(8))
    with pytest.raises(BadInput, match="expected features of 9 images over all ranks, got 8"):
        sums.reduce(lambda x: x)


def test_psnr_ssims_equal_scikit_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals = photos(5)
    noise = np.random.default_rng(0).normal(size=originals.shape) * np.array([5, 10, 15, 20, 25])[:, None, None, None]
    recon = np.clip(originals + noise, 0, 255).round().astype(np.uint8)
    run = tmp_path / "run"
    folder_of(recon, run / "images")
    folder_of(originals, run / "originals")
    out = tmp_path / "out.json"
    assert psnr_ssims.main([str(run), "--processes", "2", "--batch-size", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    pairs = list(zip(originals, recon, strict=True))
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    assert result["psnr_rgb_u8"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert [result["images"][f"{i:03d}"]["psnr_rgb_u8"] for i in range(5)] == pytest.approx(expected, abs=1e-9)
    similar = np.mean([structural_similarity(a, b, data_range=255, **wang) for a, b in pairs])
    assert result["ssim_wang_rgb_u8"] == pytest.approx(similar, abs=1e-9)
    pooled = peak_signal_noise_ratio(originals, recon, data_range=255)
    assert result["psnr_pooled_rgb_u8"] == pytest.approx(pooled, abs=1e-9)
    assert pooled < np.mean(expected)
    archives = npz_of(tmp_path / "a.npz", originals), npz_of(tmp_path / "b.npz", recon)
    capsys.readouterr()
    assert psnr_ssims.main([str(x) for x in archives]) == 0
    assert f"psnr_rgb_u8: {np.mean(expected):.6f}" in capsys.readouterr().out


def test_psnr_ssims_pairs_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder_of(photos(3), tmp_path / "a"), folder_of(photos(3), tmp_path / "b")
    (b / "001.png").rename(b / "009.png")
    (tmp_path / "c").mkdir()
    for arguments, message in (
        ((a, b), "expected an image 001 as the other folder has (2 without a pair)"),
        ((a, tmp_path / "none"), "none: no such file"),
        ((a,), "expected originals/ and images/"),
        ((a, npz_of(tmp_path / "n.npz", photos(4))), "expected 3 images"),
        ((a, folder_of(photos(3, 40), tmp_path / "small")), "expected (48, 48) pixels as its original, got (40, 40)"),
    ):
        assert psnr_ssims.main([str(x) for x in arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("folder", ["eval", "gpu_eval"])
def test_programs_know_no_models_and_no_trainers(folder: str) -> None:
    root = Path(__file__).parent.parent / folder
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rqvae"):
                assert node.module.startswith(("rqvae.metrics", "rqvae.errors", "rqvae.files")), (
                    f"{path}: {node.module}"
                )
