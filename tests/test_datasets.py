"""Datasets, transforms, and the stream of samples built on them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rqvae.errors import BadInput
from rqvae.games.collect import collect
from rqvae.img_datasets.game_frames import GameFrames, rank_split
from rqvae.img_datasets.image_folder import ImageFolder
from rqvae.img_datasets.interfaces import (
    ActionCondition,
    ClassCondition,
    DataSpec,
    LabeledImageData,
    LabeledImageDataset,
    LabeledImageDatasetWrapper,
    Split,
)
from rqvae.img_datasets.photos import FILES, SkimagePhotos
from rqvae.img_datasets.transforms import ValTransform

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recording")
    collect("maze-chase", 5000, 32, out, shard_frames=1500)
    return out


def read_recording(root: Path) -> dict[str, np.ndarray]:
    tables = [dict(np.load(path)) for path in sorted(root.glob("shard-*.npz"))]
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


def opened(split: Split, root: Path, **arguments: int) -> GameFrames:
    dataset = GameFrames(split, root=str(root), size=32, **arguments)
    dataset.open()
    return dataset


def red(sample: LabeledImageData) -> int:
    return int(sample.require_img()[0, 0, 0])


def image_bytes(dataset: LabeledImageDataset) -> list[bytes]:
    return [dataset[i].require_img().permute(1, 2, 0).numpy().tobytes() for i in range(len(dataset))]


# game frames


def test_constructor_touches_no_disk() -> None:
    spec = GameFrames("train", root="/nowhere", size=32, history=4).spec
    assert spec == DataSpec((3, 32, 32), num_actions=5, history=4)
    assert ImageFolder("train", root="/nowhere", size=64, num_classes=7).spec == DataSpec((3, 64, 64), num_classes=7)
    assert SkimagePhotos("val").spec.num_classes == len(FILES)


def test_no_frame_is_in_two_splits(recording: Path) -> None:
    sets = {split: set(image_bytes(opened(split, recording))) for split in SPLITS}
    assert not sets["test"] & sets["train"]
    assert not sets["test"] & sets["val"]
    assert not sets["val"] & sets["train"]
    recorded = read_recording(recording)
    ranks = rank_split(0, int(recorded["episode"].max()) + 1)
    raw = {
        s: {f.tobytes() for f, k in zip(recorded["frames"], recorded["episode"], strict=True) if ranks[int(k)] == s}
        for s in SPLITS
    }
    assert (raw["val"] | raw["test"]) & raw["train"], "the recording must put the rule to the test"
    assert sets["train"] == raw["train"]
    assert sets["val"] == raw["val"] - raw["train"]
    assert sets["test"] == raw["test"] - raw["train"] - raw["val"]


def write_recording(root: Path, episodes: list[list[int]], action: int = 0, missing: int = 0) -> None:
    """A recording by hand, of 32-pixel frames of one grey level each; `missing` episodes are not counted."""
    levels = np.array([level for rows in episodes for level in rows], dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), 32, 32, 3))
    episode = np.repeat(np.arange(len(episodes), dtype=np.int32), [len(rows) for rows in episodes])
    np.savez_compressed(
        root / "shard-00000.npz", frames=frames, action=np.full(len(levels), action, np.int16), episode=episode
    )
    content = (root / "shard-00000.npz").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    shard = {"file": "shard-00000.npz", "bytes": len(content), "sha256": sha256, "frames": len(levels)}
    meta = {
        "schema": 1,
        "size": 32,
        "seed": 0,
        "episodes": len(episodes) - missing,
        "action_names": [*"abcde"],
        "shards": [shard],
    }
    (root / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"action": 5}, "action: expected 0 to 4, got 5"), ({"action": -1}, "action: expected 0 to 4, got -1"),
     ({"missing": 1}, "episode: expected 0 to 2, got 3")],
)  # fmt: skip
def test_numbers_out_of_range_are_named(wrong: dict[str, int], words: str, tmp_path: Path) -> None:
    """An action of -1 would be the last one's vector."""
    write_recording(tmp_path, [[1, 2, 3, 4]] * 4, **wrong)
    with pytest.raises(BadInput, match=rf"shard-00000\.npz: {words}"):
        opened("train", tmp_path)


def test_frames_of_several_splits_stay_in_the_first(tmp_path: Path) -> None:
    levels: dict[Split, list[int]] = {"train": [1, 2, 2, 3], "val": [3, 4, 5, 1], "test": [5, 6, 1, 6]}
    write_recording(tmp_path, [levels[rank_split(0, 3)[k]] for k in range(3)])
    shown = {split: [red(s) for s in map(opened(split, tmp_path).__getitem__, range(2))] for split in ("val", "test")}
    assert len(opened("train", tmp_path)) == 4
    assert shown == {"val": [4, 5], "test": [6, 6]}
    assert [len(opened(split, tmp_path)) for split in ("val", "test")] == [2, 2]


def test_splits_are_of_episodes_and_depend_on_the_seed() -> None:
    ranks = rank_split(0, 200)
    assert [list(ranks.values()).count(s) for s in SPLITS] == [180, 10, 10]
    assert ranks == rank_split(0, 200) != rank_split(1, 200)
    assert set(rank_split(5, 3).values()) == set(SPLITS)


@pytest.mark.parametrize("history", [1, 4])
def test_actions_are_those_before_the_frame_in_its_episode(recording: Path, history: int) -> None:
    """Against a walk over the raw recording, frame by frame."""
    recorded = read_recording(recording)
    dataset = opened("train", recording, history=history)
    ranks = rank_split(0, int(recorded["episode"].max()) + 1)
    rows = [i for i, k in enumerate(recorded["episode"]) if ranks[int(k)] == "train"]
    assert len(rows) == len(dataset)
    past: list[int] = []
    for index, row in enumerate(rows):
        if row == 0 or recorded["episode"][row] != recorded["episode"][row - 1]:
            past = []
        sample = dataset[index]
        condition = sample.condition
        assert isinstance(condition, ActionCondition)
        known = past[-history:]
        missing = history - len(known)
        assert condition.actions.tolist() == [5] * missing + known
        assert condition.mask.tolist() == [False] * missing + [True] * len(known)
        assert condition.context is None
        assert condition.actions.dtype == torch.int64
        assert sample.require_img().numpy().transpose(1, 2, 0).tobytes() == recorded["frames"][row].tobytes()
        past.append(int(recorded["action"][row]))


def test_recording_bad_input(recording: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="python -m rqvae collect maze-chase --frames 20000 --size 32 --out .*empty"):
        opened("train", tmp_path / "empty")
    copy = tmp_path / "copy"

    def fresh() -> Path:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(recording, copy)
        return copy

    (fresh() / "shard-00001.npz").unlink()
    with pytest.raises(BadInput, match=r"shard-00001\.npz: expected a shard"):
        opened("train", copy)
    shard = fresh() / "shard-00001.npz"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(BadInput, match=rf"shard-00001\.npz: expected {len(content)} bytes, got {len(content) - 100}"):
        opened("train", copy)
    shard.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    with pytest.raises(BadInput, match=r"shard-00001\.npz: expected sha256"):
        opened("train", copy)
    (fresh() / "meta.json").write_text('{"schema": 1}')
    with pytest.raises(BadInput, match=r"meta\.json: expected the description"):
        opened("train", copy)
    with pytest.raises(BadInput, match="size: expected 64, got a recording with 32"):
        GameFrames("train", root=str(recording), size=64).open()
    with pytest.raises(BadInput, match="num_actions: expected 4, got a recording with 5"):
        opened("train", recording, num_actions=4)
    with pytest.raises(BadInput, match="history: expected less than"):
        opened("train", recording, history=1000)
    with pytest.raises(BadInput, match="history"):
        GameFrames("train", root="x", size=32, history=0)


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    collect("maze-chase", 30, 32, tmp_path, max_steps=1000)
    assert json.loads((tmp_path / "meta.json").read_text())["episodes"] < 3
    with pytest.raises(BadInput, match="for the split train"):
        opened("train", tmp_path)


def test_fingerprint_follows_the_data(recording: Path, tmp_path: Path) -> None:
    collect("maze-chase", 5000, 32, tmp_path, shard_frames=1500, seed=1)
    prints = {opened("train", recording).fingerprint(), opened("val", recording).fingerprint()}
    assert opened("train", recording).fingerprint() in prints
    assert opened("train", tmp_path).fingerprint() not in prints


# photos


def places_of(patch: np.ndarray, photo: np.ndarray) -> list[tuple[int, int]]:
    """Where a patch (32, 32, 3) lies in a photo: by its diagonal first, then by all of it."""
    h, w = photo.shape[0] - 31, photo.shape[1] - 31
    fits = np.ones((h, w), dtype=bool)
    for k in range(0, 32, 3):
        fits &= photo[k : k + h, k : k + w, 1] == patch[k, k, 1]
    return [(r, c) for r, c in np.argwhere(fits) if np.array_equal(photo[r : r + 32, c : c + 32], patch)]


def test_photos_are_natural_and_their_splits_disjoint() -> None:
    """Each patch is found in its photo as PIL reads it, in columns that no other split touches."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    photos = [np.array(Image.open(folder / name).convert("RGB")) for name in FILES.values()]
    columns: dict[str, dict[int, set[int]]] = {}
    for split in SPLITS:
        dataset = SkimagePhotos(split, patches_per_photo=12)
        dataset.open()
        assert len(dataset) == len(FILES) * (12 if split == "train" else 3)
        columns[split] = {k: set() for k in range(len(FILES))}
        for i in range(len(dataset)):
            sample = dataset[i]
            assert isinstance(sample.condition, ClassCondition)
            label = int(sample.condition.label)
            photo = photos[label]
            patch = sample.require_img().permute(1, 2, 0).numpy()
            assert patch.shape == (32, 32, 3)
            places = places_of(patch, photo)
            assert places
            if len(places) == 1:
                columns[split][label] |= set(range(places[0][1], places[0][1] + 32))
    for k in range(len(FILES)):
        assert not columns["train"][k] & (columns["val"][k] | columns["test"][k])
        assert not columns["val"][k] & columns["test"][k]
    assert all(columns[s][0] for s in SPLITS)


def test_photos_by_name_and_of_any_size() -> None:
    dataset = SkimagePhotos("test", size=256, patches_per_photo=4, photos=["coffee", "chelsea"])
    dataset.open()
    assert dataset.spec == DataSpec((3, 256, 256), num_classes=2, names=("coffee", "chelsea"))
    assert [tuple(dataset[i].require_img().shape) for i in range(len(dataset))] == [(3, 256, 256)] * 2
    with pytest.raises(BadInput, match="photos"):
        SkimagePhotos("test", photos=["lena"])


# image folders


def save_image(path: Path, colour: int, size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 1, 2)).save(path)


def test_image_folder_is_sorted_and_labelled(tmp_path: Path) -> None:
    for colour, name in ((3, "b/x.PNG"), (1, "a/2.bmp"), (2, "a/3.png")):
        save_image(tmp_path / "train" / name, colour)
    (tmp_path / "elsewhere").mkdir()
    save_image(tmp_path / "elsewhere" / "4.png", 4)
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    dataset = ImageFolder("train", root=str(tmp_path), size=8, num_classes=3)
    dataset.open()
    samples = [dataset[i] for i in range(len(dataset))]
    assert [red(s) for s in samples] == [1, 2, 3, 4]
    assert [int(s.condition.label) for s in samples if isinstance(s.condition, ClassCondition)] == [0, 0, 1, 2]
    assert samples[0].require_img().shape == (3, 10, 20)
    batch = LabeledImageDatasetWrapper.default_collate_fn(samples)
    assert [Path(p).name for p in batch.img_path or []] == ["2.bmp", "3.png", "x.PNG", "4.png"]
    flat = ImageFolder("train", root=str(tmp_path), size=8)
    flat.open()
    assert len(flat) == 4
    assert flat[0].condition is None
    wrong = ImageFolder("train", root=str(tmp_path), size=8, num_classes=2)
    with pytest.raises(BadInput, match=r"expected (num_classes = )?2 .*got 3"):
        wrong.open()


def test_image_folder_of_the_test_split_is_val_unless_said(tmp_path: Path) -> None:
    save_image(tmp_path / "val" / "a.png", 1)
    save_image(tmp_path / "held_out" / "a.png", 2)
    default = ImageFolder("test", root=str(tmp_path), size=8)
    said = ImageFolder("test", root=str(tmp_path), size=8, split_folders={"test": "held_out"})
    default.open()
    said.open()
    assert (red(default[0]), red(said[0])) == (1, 2)
    with pytest.raises(BadInput, match="split_folders"):
        ImageFolder("val", root=str(tmp_path), size=8, split_folders={"test": "held_out"})


def test_image_folder_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train: expected a folder of images for the split train"):
        ImageFolder("train", root=str(tmp_path), size=8).open()
    (tmp_path / "train" / "dogs").mkdir(parents=True)
    with pytest.raises(BadInput, match="train: expected images"):
        ImageFolder("train", root=str(tmp_path), size=8).open()
    with pytest.raises(BadInput, match="dogs: expected images"):
        ImageFolder("train", root=str(tmp_path), size=8, num_classes=1).open()


def folder_with_bad_images(root: Path) -> None:
    """Good: 0 and 3. Bad: 1 a text, 2 a truncated PNG, 4 with 16 bits."""
    for k in (0, 2, 3):
        save_image(root / "train" / f"{k}.png", k, (64, 64))
    (root / "train" / "1.png").write_text("not an image")
    whole = (root / "train" / "2.png").read_bytes()
    (root / "train" / "2.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(root / "train" / "4.png")


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    folder_with_bad_images(tmp_path)
    dataset = ImageFolder("train", root=str(tmp_path), size=8)
    dataset.open()
    assert [red(dataset[0]), red(dataset[3])] == [0, 3]
    for k in (1, 2, 4):
        with pytest.raises(BadInput, match=rf"{k}\.png: expected a readable image") as caught:
            dataset[k]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    folder_with_bad_images(tmp_path)
    dataset = ImageFolder("train", root=str(tmp_path), size=8, on_bad_image="skip")
    dataset.open()
    stream = LabeledImageDatasetWrapper(dataset, ValTransform(dataset.spec), {}, 0, shuffle=False)
    loader = DataLoader(stream, batch_size=5, num_workers=workers, collate_fn=stream.collate_fn)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = next(iter(loader))
            assert (batch.require_img()[:, 0, 0, 0] * 255).round().tolist() == [0, 3, 3, 3, 0]
    assert dataset.skipped == 3
    if not workers:
        assert [r.getMessage().split(":")[0][-5:] for r in caplog.records] == ["1.png", "2.png", "4.png"]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_text("not an image")
    dataset = ImageFolder("train", root=str(tmp_path), size=8, on_bad_image="skip")
    dataset.open()
    with pytest.raises(BadInput, match="at least one readable image"):
        dataset[0]
