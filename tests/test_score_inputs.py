"""What scores are computed from: numbers and images of every kind, those that are refused, in bounded memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from eval import psnr_ssims
from eval.pytorch_fid import (
    Moments,
    StreamingStatistics,
    frechet_distance,
    frechet_distance_features,
    write_adm_reference,
    write_features,
    write_image_npz,
    write_statistics,
)
from eval.pytorch_fid.__main__ import main as fid
from gpu_eval.fid.__main__ import main as adm
from rqvae.files import file_sha256
from rqvae.metrics.evaluation import FeatureSums
from rqvae.metrics.extractors import INCEPTION_URL, Extractor, Features, InceptionExtractor, make_extractor
from rqvae.metrics.images import ImageSource, read_image
from rqvae.metrics.perceptual import LPIPSScore
from tests.conftest import ROOT
from tests.inception_weights import write_random_inception
from tests.test_fid_programs import PIXELS, folder_of, npz_of, photos

ROWS = np.random.default_rng(0).normal(size=(60, 4)) @ np.diag([1, 2, 3, 4]) + 5
MEAN, COV = ROWS.mean(0), np.cov(ROWS.T)
OTHER = (ROWS[:30].mean(0), np.cov(ROWS[:30].T))


@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [
        (lambda x: x.astype(np.longdouble), 1e-14), (lambda x: x.astype(">f8"), 1e-14),
        (lambda x: x.astype(np.float32), 1e-6), (lambda x: x.astype(">f4"), 1e-6),
        (lambda x: x.astype(np.float16), 1e-2),
        (lambda x: x[::-1].copy()[::-1], 1e-14), (np.asfortranarray, 1e-14), (lambda x: x.tolist(), 1e-14),
        (torch.from_numpy, 1e-14), (lambda x: torch.from_numpy(x).requires_grad_(), 1e-14),
        (lambda x: torch.from_numpy(x).float(), 1e-6), (lambda x: torch.from_numpy(x).bfloat16(), 5e-2),
    ],
)  # fmt: skip
def test_numbers_of_every_float_type(convert: Callable, tolerance: float) -> None:
    """Arrays of any byte order and strides, tensors, lists."""
    expected = frechet_distance(MEAN, COV, *OTHER)
    assert frechet_distance(convert(MEAN), convert(COV), *OTHER) == pytest.approx(expected, rel=tolerance)
    few, many = ROWS[:4].copy(), ROWS[20:].copy()
    expected = frechet_distance_features(few, many)
    assert frechet_distance_features(convert(few), many) == pytest.approx(expected, rel=tolerance)
    seen = StreamingStatistics(4).update(convert(ROWS))
    np.testing.assert_allclose(seen.cov, COV, rtol=tolerance, atol=tolerance * np.abs(COV).max())


def test_what_are_no_real_numbers_is_refused() -> None:
    """In others' code a complex mean or covariance loses its imaginary part without a word."""
    for wrong in (
        COV.astype(complex), torch.from_numpy(COV).to(torch.complex128), COV > 0, COV.astype(object), COV.astype(str),
        [[1.0], [1.0, 2.0]], COV * 1e200, None,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            frechet_distance(MEAN, wrong, *OTHER)
        with pytest.raises(ValueError, match="expected"):
            frechet_distance_features(wrong, ROWS)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(MEAN * 1e200, COV, *OTHER)
    with pytest.raises(ValueError, match="expected floats"):
        frechet_distance_features(ROWS.astype(int), ROWS)


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow clips floats and 16 bits to 255: pictures of floats in [0, 1] would all be black, without an error."""
    levels = np.linspace(-3, 7, 48 * 48, dtype=np.float32).reshape(48, 48)
    deep = ((levels + 3) * 6000).astype(np.uint16)
    for name, content, said in (
        ("float.tif", levels, "8 bits, got one of floats"),
        ("deep.png", deep, "8 bits, got one of 16 bits"),
        ("int.tif", deep.astype(np.int32), "8 bits, got one of 32 bits"),
    ):
        place = folder_of(photos(3), tmp_path / name.replace(".", "_"))
        Image.fromarray(content).save(place / name)
        good = folder_of(photos(4), tmp_path / f"good_{name}")
        assert fid([str(good), str(place), *PIXELS]) == 2
        assert said in errors(capsys)[0]
        for i, path in enumerate(sorted(place.iterdir())):
            path.rename(place / f"{i:03d}{path.suffix}")  # the broken one has a partner
        assert psnr_ssims.main([str(good), str(place)]) == 2
        assert "expected an image" in errors(capsys)[0]


def test_grey_palette_and_transparent_images_are_rgb(tmp_path: Path) -> None:
    grey, colour = photos(1)[0, ..., 0], photos(1)[0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey > 99).save(tmp_path / "two.png")
    Image.fromarray(np.dstack([colour, np.full((48, 48), 7, np.uint8)])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.dstack([grey] * 3))
    np.testing.assert_array_equal(read_image(tmp_path / "two.png"), np.dstack([(grey > 99) * np.uint8(255)] * 3))
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), colour)


def test_photos_are_not_turned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dataset reads the pixels as they are stored, so a reconstruction lies as they lie."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.fromarray(photos(1)[0]).save(tmp_path / "a" / "x.jpg", quality=95, exif=turned)
    Image.open(tmp_path / "a" / "x.jpg").save(tmp_path / "b" / "x.png", exif=Image.Exif())
    assert psnr_ssims.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "psnr_rgb_u8: 100.0" in capsys.readouterr().out


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a program says when it ends with 2; there is one, and no traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    found = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, said
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


class Stub(Extractor):
    """What the network of FID gives in shape, from mean colours."""

    name = "fid"
    dim = 2048

    def __init__(self, **_: object) -> None:
        super().__init__()

    def load(self) -> Stub:
        return self

    def forward(self, images_bchw_u8: torch.Tensor) -> Features:
        x = images_bchw_u8.float().mean((2, 3))
        waves = (x @ torch.arange(3.0)[:, None] + torch.arange(2048.0)).sin()
        return Features(waves, waves[:, :2023].contiguous(), waves[:, :1008].contiguous())

    def identity(self) -> dict[str, str]:
        return {"extractor": "inception-2015-12-05", "weights_sha256": "5", "resize": "tf1", "scaling": "tf"}


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, Path]:
    """Inputs that no program can use."""
    (tmp_path / "empty").mkdir()
    mixed = folder_of(photos(4), tmp_path / "mixed")
    Image.fromarray(photos(1, 50)[0]).save(mixed / "003.png")
    whole = npz_of(tmp_path / "whole.npz", photos(40))
    short, damaged = tmp_path / "short.npz", tmp_path / "damaged.npz"
    short.write_bytes(whole.read_bytes()[:-3000])
    hurt = bytearray(whole.read_bytes())
    hurt[5000:5400] = bytes(400)
    damaged.write_bytes(hurt)
    early = tmp_path / "early.npz"
    with zipfile.ZipFile(early, "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (40, 48, 48, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(photos(4).tobytes())
    return {
        "empty": tmp_path / "empty",
        "mixed": mixed,
        "floats": npz_of(tmp_path / "floats.npz", photos(4) / 100 - 1),
        "key": npz_of(tmp_path / "key.npz", images=photos(4)),
        "short": short,
        "damaged": damaged,
        "early": early,
        "one": npz_of(tmp_path / "one.npz", photos(1)),
    }


SAID = {
    "empty": "empty: expected images",
    "mixed": "003.png: expected ",
    "floats": "floats.npz: arr_0: expected uint8 (N, H, W, 3) in C order, got float64",
    "key": "key.npz: expected the key arr_0",
    "short": "short.npz: expected a complete npz",
    "damaged": "damaged.npz: arr_0: damaged at image",
    "early": "early.npz: arr_0: expected 40 images, the file ends at",
    "one": "one.npz: expected at least 2 images, got 1",
}


def program(name: str, good: Path, wrong: Path) -> int:
    if name == "fid":
        return fid([str(good), str(wrong), *PIXELS])
    if name == "adm":
        return adm([str(good), str(wrong), "--device", "cpu"])
    return psnr_ssims.main([str(good), str(wrong)])


@pytest.mark.parametrize("name", ["fid", "adm", "psnr_ssims"])
def test_bad_input_of_every_program_is_one_line(
    name: str, bad: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_eval.fid.__main__.InceptionExtractor", Stub)
    counts = {"mixed": 4, "damaged": 40, "early": 40, "floats": 4, "one": 1}
    for kind, said in SAID.items():
        if (name, kind) == ("psnr_ssims", "one"):
            continue  # a pair has a score
        images = photos(counts.get(kind, 5))
        good = tmp_path / f"good_{kind}.npz"
        good = folder_of(images, good.with_suffix("")) if kind in ("empty", "mixed") else npz_of(good, images)
        if len(images) == 1:
            good = npz_of(good, photos(5))
        assert program(name, good, bad[kind]) == 2, kind
        assert said in errors(capsys)[0], kind


def test_statistics_of_other_networks_are_refused_by_every_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_eval.fid.__main__.InceptionExtractor", Stub)
    images, own = npz_of(tmp_path / "images.npz", photos(5)), Stub().identity()
    rng = np.random.default_rng(0)
    pooled, spatial = (Moments(rng.random(d), np.eye(d)) for d in (2048, 2023))
    for key, other in (
        ("extractor", "dinov2_vitl14"),
        ("resize", "clean"),
        ("weights_sha256", "6"),
        ("scaling", "unit"),
    ):
        a, b = tmp_path / f"a_{key}.npz", tmp_path / f"b_{key}.npz"
        write_features(a, rng.random((9, 6)), own)
        write_features(b, rng.random((9, 6)), own | {key: other})
        assert fid([str(a), str(b)]) == 2
        line = errors(capsys)[0]
        assert f"{a}, {b}: expected features of one {key}, got {own[key]} and {other}" in line
    reference = tmp_path / "reference.npz"
    write_adm_reference(reference, photos(5), pooled, spatial)
    with zipfile.ZipFile(reference, "a") as archive, archive.open("protocol.npy", "w") as file:
        np.lib.format.write_array(file, np.array('{"resize": "clean"}'))
    assert adm([str(reference), str(images), "--device", "cpu"]) == 2
    assert "expected features of one resize, got clean and tf1" in errors(capsys)[0]
    write_statistics(tmp_path / "s.npz", Moments(np.zeros(6), np.eye(6)), 9, {"extractor": "pixels", "resize": "pil"})
    assert fid([str(tmp_path / "s.npz"), str(images), *PIXELS]) == 2
    assert "expected features of one resize, got pil and none" in errors(capsys)[0]


def test_truncated_weights_are_one_line_of_both_programs(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = npz_of(tmp_path / "images.npz", photos(5))
    plain = tmp_path / "inception.pth"
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    for path, said in ((plain, "expected a state dict of tensors"), (named, "expected sha256 6726825d")):
        path.write_bytes(weights.read_bytes()[:-500_000])
        for main in (fid, adm):
            assert main([str(images), str(images), "--weights", str(path), "--device", "cpu"]) == 2
            assert f"inception.weights: {path}: {said}" in errors(capsys)[0]


def test_weights_come_from_a_url_once(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into torch.hub's folder, where the beginning of the sha256 in the name is that of the file."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    images, served = npz_of(tmp_path / "images.npz", photos(4)), tmp_path / "served"
    served.mkdir()
    name = f"pt_inception-2015-12-05-{file_sha256(weights)[:8]}.pth"
    for file in (name, "pt_inception-2015-12-05-6726825d.pth"):
        (served / file).write_bytes(weights.read_bytes())
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert fid([str(images), str(images), "--weights", f"{url}/{name}"]) == 0
        (served / name).unlink()
        assert fid([str(images), str(images), "--weights", f"{url}/{name}"]) == 0
        assert [file.name for file in (tmp_path / "hub" / "checkpoints").iterdir()] == [name]
        capsys.readouterr()
        assert fid([str(images), str(images), "--weights", f"{url}/pt_inception-2015-12-05-6726825d.pth"]) == 2
        assert "(sha256 6726825d...) cannot be had (invalid hash value" in errors(capsys)[0]
        server.shutdown()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    assert fid([str(images), str(images)]) == 2
    line, place = errors(capsys)[0], tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    for part in (str(place), INCEPTION_URL, "sha256 6726825d", "no route", "place it there", "random-vgg16"):
        assert part in line


def test_features_are_gathered_where_they_are_kept_alone() -> None:
    """Statistics of many images come from sums: no message is longer than D + 1 rows of D numbers."""
    lengths, sums = [], FeatureSums(6, 9, inception=False)

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        lengths.append(x.numel())
        return x

    def all_gather(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("features of many images must stay where they are")

    sums.update(Features(torch.rand(9, 6)), torch.arange(9))
    sums.reduce(all_reduce)
    sums.gather(all_gather)
    assert lengths == [6 + 1, (6 + 1) * 6]
    few = FeatureSums(6, 5, inception=False)
    few.update(Features(torch.rand(5, 6)), torch.arange(5))
    few.gather(lambda x: x[None])
    assert few.features("pooled").shape == (5, 6)


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
import gpu_eval.fid.__main__ as program
from tests.test_score_inputs import Stub
program.InceptionExtractor = Stub
assert program.main([sys.argv[1], sys.argv[2], "--device", "cpu", "--mode", "strict"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_an_npz_is_never_in_memory(tmp_path: Path) -> None:
    """1040 images of 256 px are 195 MiB; what is kept of them are 26 KiB of features and logits each."""
    peaks, few = [], tmp_path / "few.npz"
    write_image_npz(few, np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), np.uint8))
    for count in (40, 1040):
        path = tmp_path / f"{count}.npz"
        write_image_npz(path, np.random.default_rng(1).integers(0, 256, (count, 256, 256, 3), np.uint8))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(few), str(path)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        peaks.append(float(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 100, peaks


def test_one_forward_gives_everything(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once through each convolution of the network for pool3, the tensor of sFID, and the logits."""
    extractor, calls = InceptionExtractor(weights=str(weights)).load(), []
    for module in extractor.network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *x: calls.append(x[0]))
    found = extractor(torch.from_numpy(photos(2)).permute(0, 3, 1, 2))
    assert [tuple(x.shape) for x in (found.pooled, found.spatial, found.logits)] == [(2, 2048), (2, 2023), (2, 1008)]
    assert len(calls) == len(set(calls)) == 94


def test_networks_of_scores_compute_in_full_float32(weights: Path, tmp_path: Path) -> None:
    """The CUDA backend trains with TF32 products, cuDNN has TF32 convolutions unless it is told otherwise."""
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    lpips = LPIPSScore(trunk_weights=str(tmp_path / "alexnet.pth")).load()
    networks = [InceptionExtractor(weights=str(weights)).load(), make_extractor("random-vgg16").load()]
    seen, images = [], torch.from_numpy(photos(1)).permute(0, 3, 1, 2)

    def note(*_: object) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, autocast("cpu")))

    before, autocast = torch.get_float32_matmul_precision(), torch.is_autocast_enabled
    torch.set_float32_matmul_precision("high")
    try:
        for run, network in [
            *((lambda net=net: net(images).pooled, net.network) for net in networks),
            (lambda: lpips(images / 255, images / 300), lpips._distance),
        ]:
            handle = network.register_forward_hook(note)
            with torch.autocast("cpu", torch.bfloat16):
                assert run().dtype == torch.float32
            handle.remove()
        assert seen == [("highest", False, False)] * 3
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_masks_beside_samples_are_not_samples(tmp_path: Path) -> None:
    """What `sample --masks` writes below the samples; a folder of one's own that has such a name is images."""
    shutil.copytree(folder_of(photos(5), tmp_path / "first"), tmp_path / "samples")
    shutil.copytree(tmp_path / "samples", tmp_path / "samples" / "masks")
    shutil.copytree(tmp_path / "samples" / "masks", tmp_path / "samples" / "more" / "masks")
    assert len(ImageSource(tmp_path / "samples")) == 15
    (tmp_path / "samples" / "provenance.json").write_text("{}")
    source = ImageSource(tmp_path / "samples")
    assert [file.relative_to(source.path).parts[0] for file in source.files[5:]] == ["more"] * 5
    assert len(source) == 10
    assert len(ImageSource(tmp_path / "samples" / "masks")) == 5
