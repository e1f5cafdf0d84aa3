"""`python -m rqvae make-reference`: what the file holds, for any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.pytorch_fid.__main__ import main as pytorch_fid
from rqvae.configuration import read
from rqvae.metrics.feature_files import read_features
from tests.conftest import finish, start
from tests.extractors import Projections

CONFIG = "configs/debug/stage2.yaml"


def words(out: Path, split: str = "train", *more: object) -> list[object]:
    line = ["make-reference", CONFIG, out, "--split", split, "--extractor", "tests.extractors.Projections"]
    return [*line, "--batch-size", 7, *more]


def features(split: str) -> np.ndarray:
    """Of every image of the split, as it is stored: the debug data have their size already."""
    dataset, _ = read([CONFIG]).instantiate().data.make(split)
    dataset.open()
    return Projections()(torch.stack([dataset[i].img for i in range(len(dataset))])).pooled.numpy()


@pytest.mark.parametrize("split", ["train", "val"])
def test_features_are_those_of_every_image_once(split: str, tmp_path: Path, cli, capfd) -> None:
    out = tmp_path / "deep" / "reference.npz"
    assert cli(*words(out, split, "--keep", "features")) == 0
    file = read_features(out)
    np.testing.assert_array_equal(file.features, features(split))
    assert f"{out}: features of {len(file.features)} images of {split}" in capfd.readouterr().out
    assert file.protocol["split"] == split
    assert file.protocol["transform"] == "rqvae.img_datasets.transforms.ValTransform()", "no flips"
    assert file.protocol["image_shape"] == [3, 16, 16]
    assert len(file.protocol["transform_sha256"]) == 64
    assert file.protocol["data"].startswith(f"SkimagePhotos:{split}")
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_statistics_for_one_and_two_processes(tmp_path: Path, cli) -> None:
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    assert cli(*words(one)) == 0
    code, errors = finish(start(*words(two, "train", "--world-size", 2)))
    assert code == 0, errors
    a, b, rows = read_features(one), read_features(two), features("train").astype(float)
    assert a.features is None
    assert a.n == b.n == len(rows)
    for file in (a, b):
        np.testing.assert_allclose(file.pooled.mean, rows.mean(0), rtol=1e-10)
        np.testing.assert_allclose(file.pooled.cov, np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-10)
    assert a.protocol == b.protocol


def test_few_images_are_kept_as_features(tmp_path: Path, cli) -> None:
    assert cli(*words(tmp_path / "few.npz", "train", "--images", 5)) == 0
    kept = read_features(tmp_path / "few.npz").features
    np.testing.assert_array_equal(kept, features("train")[:5])
    assert cli(*words(tmp_path / "moments.npz", "train", "--images", 5, "--keep", "statistics")) == 0
    file = read_features(tmp_path / "moments.npz")
    assert file.features is None
    np.testing.assert_allclose(file.pooled.cov, np.cov(kept.astype(float), rowvar=False), rtol=1e-10)


def test_other_programs_read_it(tmp_path: Path, cli, capsys) -> None:
    out, report = tmp_path / "reference.npz", tmp_path / "report.json"
    assert cli(*words(out)) == 0
    arrays = np.load(out)
    assert arrays["mu"].shape == (8,)
    assert arrays["sigma"].shape == (8, 8)
    assert pytorch_fid([str(out), str(out), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert abs(found["distance"]["value"]) < 1e-9 * np.trace(arrays["sigma"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--images", 1], "expected 0 or at least 2 images"),
        (["--extractor", "nowhere.Net"], "--extractor: extractor: expected inception, random-vgg16"),
        (["--weights", "x.pth"], "--extractor: extractor: tests.extractors.Projections"),
        (["--data.dataset.init_args.size", 0], "size"),
    ],
)
def test_bad_input_is_one_line(more, said, tmp_path: Path, cli, capfd) -> None:
    assert cli(*words(tmp_path / "out.npz", "train", *more)) == 2
    errors = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not list(tmp_path.iterdir())
    assert cli(*words(tmp_path / "out.txt")) == 2
    assert "out.txt: expected a name that ends in .npz" in capfd.readouterr().err
