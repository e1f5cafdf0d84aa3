"""Datasets of the Hugging Face library, from folders that the tests make and from a hub that refuses."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from rqvae.errors import BadInput
from rqvae.img_datasets.hub import ask
from rqvae.img_datasets.huggingface import HuggingFaceImages
from rqvae.img_datasets.interfaces import LabeledImageDatasetWrapper
from rqvae.img_datasets.transforms import ValTransform
from tests.conftest import ROOT, assert_same, only, tensors
from tests.hub_server import TOKEN as HUB_TOKEN
from tests.hub_server import FakeHub

TOKEN = "hf_thisIsASecretOfTheTest"
N = 48


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    datasets.disable_progress_bars()


def pictures(count: int = N, side: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (side, side + i % 3, 3), np.uint8) for i in range(count)]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def table(count: int = N) -> datasets.Dataset:
    """Pictures with label i % 4; each holds its bytes."""
    rows = {"image": [{"bytes": png(p), "path": None} for p in pictures(count)], "label": [i % 4 for i in range(count)]}
    labels = datasets.ClassLabel(names=["a", "b", "c", "d"])
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": labels}))


def as_saved(folder: Path) -> dict:
    datasets.DatasetDict({"train": table(), "validation": table(8)}).save_to_disk(str(folder))
    return {}


def as_parquet(folder: Path) -> dict:
    """Three files of 16 rows in row groups of 5, 5, 5 and 1."""
    folder.mkdir()
    for i in range(3):
        table().select(range(16 * i, 16 * i + 16)).to_parquet(folder / f"train-{i}-of-3.parquet", batch_size=5)
    table(8).to_parquet(folder / "validation-0-of-1.parquet", batch_size=5)
    return {}


def as_image_folders(folder: Path) -> dict:
    """The library orders files by name: with the row's number first, class folders would reorder them."""
    for split, count in (("train", N), ("validation", 8)):
        for i, picture in enumerate(pictures(count)):
            place = folder / split / "abcd"[i % 4]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{i:03d}.png")
    return {"by_class": True}


KINDS = {"saved": as_saved, "parquet": as_parquet, "imagefolder": as_image_folders}


def opened(folder: Path, split: str = "train", **more: object) -> HuggingFaceImages:
    dataset = HuggingFaceImages(split, dataset_name=str(folder), size=16, num_classes=4, **more)  # type: ignore[arg-type]
    dataset.open()
    return dataset


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_pixels_and_labels_that_were_written(kind: str, tmp_path: Path) -> None:
    about = KINDS[kind](tmp_path / "data")
    dataset, originals = opened(tmp_path / "data"), pictures()
    order = sorted(range(N), key=lambda i: (i % 4, i)) if about.get("by_class") else list(range(N))
    assert len(dataset) == N
    assert len(opened(tmp_path / "data", "val")) == 8
    for k, i in enumerate(order):
        sample = dataset[k]
        assert torch.equal(sample.require_img(), torch.from_numpy(originals[i]).permute(2, 0, 1))
        assert int(sample.condition.label) == i % 4  # type: ignore[union-attr]
    few = opened(tmp_path / "data", max_samples=7)
    assert len(few) == 7
    assert torch.equal(few[6].require_img(), dataset[6].require_img())
    assert few.fingerprint() != dataset.fingerprint()
    assert opened(tmp_path / "data").fingerprint() == dataset.fingerprint()


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    as_saved(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    here = opened(tmp_path / "two").fingerprint()
    as_saved(tmp_path / "one")
    assert opened(tmp_path / "one").fingerprint() == here
    changed = table().map(lambda row, i: {"label": (row["label"] + (i == 5)) % 4}, with_indices=True)
    datasets.DatasetDict({"train": changed}).save_to_disk(str(tmp_path / "three"))
    assert opened(tmp_path / "three").fingerprint() != here


def test_a_split_may_be_a_part_of_one(tmp_path: Path) -> None:
    as_parquet(tmp_path / "data")
    splits = {"train": "train[:40]", "val": "train[40:]"}
    train, val = (opened(tmp_path / "data", split, splits=splits) for split in splits)
    whole = opened(tmp_path / "data")
    assert (len(train), len(val)) == (40, 8)
    assert torch.equal(val[0].require_img(), whole[40].require_img())


def test_streaming_gives_the_rows_of_the_table(tmp_path: Path) -> None:
    as_parquet(tmp_path / "data")
    stored, streamed = opened(tmp_path / "data"), opened(tmp_path / "data", streaming=True)
    assert len(streamed) == len(stored) == N
    for i in (0, 4, 5, 15, 16, 31, 47, 3):
        assert torch.equal(streamed[i].require_img(), stored[i].require_img())
        assert streamed[i].condition == stored[i].condition
    assert len(opened(tmp_path / "data", streaming=True, max_samples=22)) == 22


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number for each row group that is read."""
    found: list[int] = []
    read = parquet.ParquetFile.read_row_group

    def counted(self: parquet.ParquetFile, number: int, **options: object) -> object:
        found.append(number)
        return read(self, number, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    return found


def test_a_streamed_epoch_has_every_row_once_and_reads_every_group_once(tmp_path: Path, groups_read: list) -> None:
    as_parquet(tmp_path / "data")
    dataset = opened(tmp_path / "data", streaming=True, shuffle_groups=2)
    first, second = dataset.order(0, 0), dataset.order(0, 1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(N))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, opened(tmp_path / "data", streaming=True, shuffle_groups=2).order(0, 0))
    for index in first.tolist():
        dataset[index]
    assert len(groups_read) == 12, "3 files of 4 row groups"


def test_a_stream_that_goes_on_reads_no_group_before_its_position(tmp_path: Path, groups_read: list) -> None:
    as_parquet(tmp_path / "data")

    def stream() -> LabeledImageDatasetWrapper:
        dataset = opened(tmp_path / "data", streaming=True, shuffle_groups=2)
        return LabeledImageDatasetWrapper(dataset, ValTransform(dataset.spec), {}, seed=3, shuffle=True)

    whole = stream()
    samples = [whole[position].require_img() for position in range(2 * N)]
    read_by_all = len(groups_read)
    groups_read.clear()
    resumed = stream()
    assert groups_read == [], "opening reads footers"
    rest = [resumed[position].require_img() for position in range(2 * N - 8, 2 * N)]
    assert all(torch.equal(a, b) for a, b in zip(rest, samples[-8:], strict=True))
    assert read_by_all == 24
    assert len(groups_read) <= 4, "8 rows lie in two windows of two row groups at most"


def config(tmp_path: Path, folder: Path, **more: object) -> Path:
    init = {"dataset_name": str(folder), "size": 16, "num_classes": 4, **more}
    dataset = {"class_path": "rqvae.img_datasets.huggingface.HuggingFaceImages", "init_args": init}
    path = tmp_path / "hf.yaml"
    path.write_text(json.dumps({"data": {"dataset": dataset, "batch_size": 8}}))
    return path


def test_training_on_a_stream_resumes_bit_for_bit_whatever_the_workers(tmp_path: Path, cli) -> None:
    as_parquet(tmp_path / "data")
    line = ["train", "configs/debug/stage1.yaml", config(tmp_path, tmp_path / "data", streaming=True)]
    line += ["--save-dir", tmp_path / "s", "--checkpoint.every", 3, "--train.steps", 9, "--online_eval.every", "null"]
    line += ["--checkpoint.keep_last", 9]
    assert cli(*line, "--project", "whole") == 0
    whole = only(tmp_path / "s" / "whole")
    resumed = ["--resume-ckpt", whole / "checkpoints" / "step_00000003", "--data.workers", 2]
    assert cli(*line, "--project", "rest", *resumed) == 0
    assert_same(tensors(only(tmp_path / "s" / "rest"), 9), tensors(whole, 9))


def test_the_token_is_written_nowhere(tmp_path: Path) -> None:
    as_saved(tmp_path / "data")
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    line = ["train", "configs/debug/stage1.yaml", config(tmp_path, tmp_path / "data"), "--train.steps", 2]
    line += ["--save-dir", tmp_path / "s", "--logging.tensorboard", "true", "--online_eval.every", "null"]
    command = [sys.executable, "-m", "rqvae", *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert {"environment.json", "log.txt", "config.yaml", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr


class Refusing(BaseHTTPRequestHandler):
    """Answers as the hub does: with the status in the dataset's name, and its header."""

    def do_GET(self) -> None:
        named = re.search(r"s(\d{3})", self.path)
        status = int(named[1]) if named else 404
        kind = {401: "", 403: "GatedRepo", 404: "RepoNotFound"}.get(status, "")
        body = json.dumps({"error": f"refused with {self.headers.get('Authorization')}"}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *values: object) -> None:  # noqa: A002
        """Quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


PROBE = """
import sys
from rqvae.errors import BadInput
from rqvae.img_datasets.huggingface import HuggingFaceImages
for name in sys.argv[1:]:
    for streaming in (False, True):
        try:
            HuggingFaceImages("train", dataset_name=name, size=16, streaming=streaming).open()
        except BadInput as error:
            sys.stdout.write(f"{error}\\n")
"""


def asked(endpoint: str, tmp_path: Path, names: list[str], **environment: str) -> list[str]:
    """The lines that `open` ends with, downloading and streaming, for each name; in a process with its own hub."""
    own = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=own,
        check=True,
        timeout=100,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_hub_that_refuses_is_one_line_that_says_what_to_do(hub: str, tmp_path: Path) -> None:
    lines = asked(hub, tmp_path, ["user/s401", "user/s403", "user/s404"])
    expected = [
        r"user/s401: .*private.*set HF_TOKEN",
        r"user/s403: .*accept its terms at https://\S+user/s403.*HF_TOKEN",
    ]
    expected += [r"user/s404: no such dataset on the hub.*check the name"]
    assert len(lines) == 6
    for k, pattern in enumerate(expected):
        for line in lines[2 * k : 2 * k + 2]:
            assert re.search(f"^data.dataset: {pattern}", line), line
    with_token = asked(hub, tmp_path, ["user/s401"], HF_TOKEN=TOKEN)
    assert len(with_token) == 2
    assert all("the token has no access" in line for line in with_token)


@pytest.fixture
def private(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that serves `user/private`, Parquet files, to who has its token and answers 401 to others."""
    as_parquet(tmp_path / "files")
    server = FakeHub()
    server.repositories["user/private"] = {file.name: file.read_bytes() for file in (tmp_path / "files").iterdir()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_private_dataset_trains_with_the_token(streaming: bool, private: FakeHub, tmp_path: Path, cli) -> None:
    """To the weights of the same files in a folder; the token is in no file of the run, and nobody said it."""
    line = ["--train.steps", 2, "--online_eval.every", "null"]
    line += ["--logging.tensorboard", "true", "--save-dir", tmp_path / "s", "--data.workers", 0]
    own = {**os.environ, "HF_ENDPOINT": private.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_TOKEN": HUB_TOKEN}
    train = ["train", "configs/debug/stage1.yaml", config(tmp_path, Path("user/private"), streaming=streaming), *line]
    command = [sys.executable, "-m", "rqvae", *map(str, [*train, "--project", "hub"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert HUB_TOKEN not in done.stdout + done.stderr
    assert {name for name in private.served if name.endswith("parquet")} >= {
        f"train-{i}-of-3.parquet" for i in range(3)
    }
    written = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert {"environment.json", "log.txt", "config.yaml", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if HUB_TOKEN.encode() in path.read_bytes()]
    train[2] = config(tmp_path, tmp_path / "files", streaming=streaming)
    assert cli(*train, "--project", "folder") == 0
    ours, theirs = (tensors(only(tmp_path / "s" / project), 2) for project in ("hub", "folder"))
    assert_same(ours, theirs)


def test_words_of_a_library_lose_the_token(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def fail() -> None:
        raise ValueError(f"header\nBearer {TOKEN}")

    with pytest.raises(BadInput, match=r"^data.dataset: user/data: ValueError: header Bearer \*\*\*$"):
        ask("user/data", fail)


ABSENT = r"^data.dataset: user/data: the hub cannot be reached .*hf download .*dataset_name: DIR"


def test_without_a_network_the_line_says_how_to_do_without(tmp_path: Path) -> None:
    lines = asked("http://127.0.0.1:9", tmp_path, ["user/data"], HF_HUB_OFFLINE="1")
    assert len(lines) == 2
    for line in lines:
        assert re.search(ABSENT, line), line


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_the_same_line(tmp_path: Path) -> None:
    """Half a minute, as the library tries again."""
    lines = asked("http://127.0.0.1:9", tmp_path, ["user/data"])
    assert len(lines) == 2
    for line in lines:
        assert re.search(ABSENT, line), line


def refusal(*arguments: object, **more: object) -> str:
    with pytest.raises(BadInput) as caught:
        opened(*arguments, **more)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    as_saved(tmp_path / "saved")
    as_parquet(tmp_path / "parquet")
    as_image_folders(tmp_path / "images")
    for folder, streaming in (("saved", False), ("parquet", False), ("parquet", True)):
        place = tmp_path / folder
        line = refusal(place, image_column="img", streaming=streaming)
        assert re.search(r"image_column: expected one of image, label, got img", line), line
        line = refusal(place, "test", streaming=streaming)
        assert re.search(r"train.*validation", line), line
    assert "label: expected integers in [0, 3), got 3 in row 3" in refused_classes(tmp_path / "saved")
    assert "streaming: expected Parquet" in refusal(tmp_path / "images", streaming=True)
    assert "no such folder" in refusal(tmp_path / "nowhere")


def refused_classes(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        HuggingFaceImages("train", dataset_name=str(folder), size=16, num_classes=3).open()
    return str(caught.value)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"\x89PNG not really", "path": None}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(str(tmp_path / "data"))
    dataset = opened(tmp_path / "data")
    with pytest.raises(BadInput, match=r"data\[train\]\[0\]: expected a readable image"):
        dataset[0]


def test_without_the_package_the_line_says_how_to_install_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'datasets" in refusal(tmp_path)


def test_the_constructor_touches_nothing_and_checks_numbers() -> None:
    spec = HuggingFaceImages("train", dataset_name="user/nothing", size=32, num_classes=10).spec
    assert (spec.image_shape, spec.num_classes) == ((3, 32, 32), 10)
    for wrong in (
        {"size": 0},
        {"max_samples": 0},
        {"shuffle_groups": 0},
        {"num_classes": -1},
        {"splits": {"val": "x"}},
    ):
        with pytest.raises(BadInput):
            HuggingFaceImages("train", **{"dataset_name": "user/nothing", "size": 32, **wrong})  # type: ignore[arg-type]
