"""The stream of samples: collating, order, and draws that do not depend on loader workers."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from rqvae.games.collect import collect
from rqvae.img_datasets.feed import make_loader
from rqvae.img_datasets.game_frames import GameFrames
from rqvae.img_datasets.interfaces import (
    ActionCondition,
    LabeledImageData,
    LabeledImageDataset,
    LabeledImageDatasetWrapper,
)
from rqvae.img_datasets.photos import SkimagePhotos
from rqvae.img_datasets.transforms import TrainTransform
from rqvae.randomness import Draw, normal, uniform


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recording")
    collect("maze-chase", 5000, 32, out, shard_frames=1500)
    return out


class Own(SkimagePhotos):
    """A dataset with a collate function of its own."""

    def collate_fn(self, samples: Sequence[LabeledImageData]) -> LabeledImageData:
        batch = LabeledImageDatasetWrapper.default_collate_fn(samples)
        return replace(batch, additional_attr={"own": len(samples)})


def stream_of(dataset: LabeledImageDataset) -> LabeledImageDatasetWrapper:
    dataset.open()
    draws = {"noise": Draw((4, 8, 8), normal), "t": Draw((), uniform)}
    return LabeledImageDatasetWrapper(dataset, TrainTransform(dataset.spec), draws, seed=3, shuffle=True)


def load(stream: LabeledImageDatasetWrapper, workers: int, steps: int = 6, batch: int = 8) -> list[LabeledImageData]:
    positions = [list(range(k * batch, (k + 1) * batch)) for k in range(steps)]
    loader = DataLoader(stream, batch_sampler=positions, num_workers=workers, collate_fn=stream.collate_fn)
    return list(loader)


def test_default_collate_makes_a_batch(recording: Path) -> None:
    stream = stream_of(GameFrames("train", root=str(recording), size=32, history=3))
    (batch,) = load(stream, 0, steps=1)
    assert batch.require_img().shape == (8, 3, 32, 32)
    assert batch.require_img().dtype == torch.float32
    assert 0 <= batch.require_img().min() < batch.require_img().max() <= 1
    assert isinstance(batch.condition, ActionCondition)
    assert (batch.condition.actions.shape, batch.condition.mask.shape) == ((8, 3), (8, 3))
    assert batch.condition.num_actions == 5
    assert batch.condition.null().actions.eq(5).all()
    assert batch.draws is not None
    assert (batch.draws["noise"].shape, batch.draws["t"].shape) == ((8, 4, 8, 8), (8,))
    assert batch.sample_id is not None
    assert batch.sample_id.tolist() == list(range(8))
    assert len(batch) == 8


def test_own_collate_is_used_when_present() -> None:
    assert load(stream_of(Own("train", patches_per_photo=4)), 0, 1)[0].additional_attr == {"own": 8}
    assert load(stream_of(SkimagePhotos("train", patches_per_photo=4)), 0, 1)[0].additional_attr is None


def test_order_and_draws_do_not_depend_on_workers(recording: Path) -> None:
    """48 samples of a stream over 28 patches: over the end of an epoch as well."""
    for dataset in (SkimagePhotos("train", patches_per_photo=4), GameFrames("val", root=str(recording), size=32)):
        stream = stream_of(dataset)
        for one, two in zip(load(stream, 0), load(stream, 2), strict=True):
            assert torch.equal(one.require_img(), two.require_img())
            assert one.draws is not None
            assert two.draws is not None
            assert all(torch.equal(one.draws[k], two.draws[k]) for k in ("noise", "t"))
            assert one.condition is not None
            assert type(one.condition) is type(two.condition)


def test_an_epoch_shows_each_sample_once() -> None:
    stream = stream_of(SkimagePhotos("train", patches_per_photo=4))
    n = len(stream)
    first, second = ([stream.index(e * n + k) for k in range(n)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second


def test_datasets_can_be_pickled(recording: Path) -> None:
    """Loader workers that are spawned get a pickle."""
    for dataset in (
        stream_of(GameFrames("test", root=str(recording), size=32, history=2)).dataset,
        stream_of(SkimagePhotos("test")).dataset,
    ):
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(copy) == len(dataset)
        assert torch.equal(copy[1].require_img(), dataset[1].require_img())


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_batches_draws_nothing_from_the_process(recording: Path, workers: int) -> None:
    """Ranks may be threads of one process: a loader that draws its seed there changes another rank's start weights."""
    dataset = GameFrames("train", root=str(recording), size=32)
    dataset.open()
    stream = LabeledImageDatasetWrapper(dataset, TrainTransform(dataset.spec), {}, seed=0, shuffle=True)
    before = torch.get_rng_state()
    assert len(list(make_loader(stream, [[0, 1], [2, 3]], workers))) == 2
    assert torch.equal(torch.get_rng_state(), before)
