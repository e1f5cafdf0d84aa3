"""References of Fréchet distances: a split's originals through an extractor, and files that hold what came of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.files import replacing
from rqvae.img_datasets.interfaces import Split
from rqvae.metrics.evaluation import FeatureSums
from rqvae.metrics.extractors import Extractor, Features, make_extractor
from rqvae.metrics.feature_files import (
    FeatureFile,
    check_comparable,
    moments,
    read_features,
    write_features,
    write_statistics,
)
from rqvae.metrics.reconstruction import UINT8_RULE, to_uint8
from rqvae.run import DataSettings
from rqvae.trainers.evaluation_trainer import SplitWalk
from rqvae.trainers.parts import on_main

Kept = Literal["features", "statistics"]


def load_extractor(choice: str | Extractor, backend: Backend, key: str, **arguments: Any) -> Extractor:
    """An extractor on this rank's device.

    Args:
        choice: a short name, a class path, or the extractor itself.
        backend: rank 0 downloads what is missing.
        key: where the choice comes from, for errors.
        arguments: of the constructor, where the choice is a name.

    Raises:
        BadInput: weights that are missing or others.
    """
    try:
        extractor = make_extractor(choice, **arguments) if isinstance(choice, str) else choice
        on_main(backend, extractor.fetch)
        return extractor.load().to(backend.device)
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from error


def originals(data: DataSettings, split: Split, backend: Backend, per_rank: int) -> SplitWalk:
    """The images that a reference is of: each of the split once, by the run's evaluation transform.

    The train split is not augmented: an image generated from an augmented set is compared with the set itself, as
    published references are.

    Args:
        data: of the run.
        split: its name.
        backend: this rank.
        per_rank: images of a forward.
    """
    plain = replace(data, train_transform=data.val_transform, test_transform=data.val_transform)
    return SplitWalk(plain, split, backend, per_rank=per_rank)


def preprocessing(walk: SplitWalk) -> dict[str, Any]:
    """What the images of a walk are, without a look at the disk: split, image_shape, transform and transform_sha256."""
    dataset, transform = walk.data.make(walk.split)
    shape, text = list(dataset.spec.image_shape), transform.fingerprint()
    digest = hashlib.sha256(json.dumps([text, shape]).encode()).hexdigest()
    return {"split": walk.split, "image_shape": shape, "transform": text, "transform_sha256": digest}


def describe(walk: SplitWalk, extractor: Extractor, n: int) -> dict[str, Any]:
    """What a reference file says of itself; looks at the data."""
    data = {"data": walk.stream.dataset.fingerprint(), "n": n, "uint8_rule": UINT8_RULE}
    return {**extractor.identity(), **preprocessing(walk), **data}


@torch.no_grad()
def add_features(sums: FeatureSums, extractor: Extractor, images_bchw: Tensor, ids_b: Tensor, valid_b: Tensor) -> None:
    """Features of a batch (B, 3, H, W) in [0, 1], without those of the images that only fill it up."""
    found, counts = extractor(to_uint8(images_bchw)), valid_b.cpu()

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().cpu()[counts]

    pooled = rows(found.pooled)
    assert pooled is not None
    sums.update(Features(pooled, rows(found.spatial), rows(found.logits)), ids_b.cpu()[counts])


def measure_originals(
    walk: SplitWalk, extractor: Extractor, images: int = 0, *, keep: bool = False, bar: bool = True
) -> FeatureSums:
    """Sums and, where they are kept, features of all ranks on every rank; collective.

    Args:
        walk: see `originals`.
        extractor: loaded, on the device.
        images: how many of the split, 0 for all.
        keep: see `FeatureSums`.
        bar: a progress bar on rank 0.
    """
    sums = FeatureSums(extractor.dim, walk.count(images), inception=extractor.name == "fid", keep=keep)
    hidden = not bar or walk.backend.rank > 0
    with tqdm(total=sums.n, desc=f"reference {walk.split}", unit="image", disable=hidden, leave=False) as shown:
        for batch, valid in walk.batches(images):
            assert batch.sample_id is not None
            add_features(sums, extractor, batch.require_img(), batch.sample_id, valid)
            shown.update(min(len(batch) * walk.backend.world_size, sums.n - shown.n))
    sums.reduce(walk.backend.all_reduce)
    sums.gather(walk.backend.all_gather)
    return sums


def write_reference(path: Path, sums: FeatureSums, facts: Mapping[str, Any], kept: Kept | None = None) -> Kept:
    """Write a reference, whole or not at all.

    Args:
        path: an npz.
        sums: of all ranks, gathered.
        facts: see `describe`.
        kept: what to write; None is the features where there are no more of them than dimensions, as distances are then
            faster and more exact from them, and statistics else.
    """
    features = None if kept == "statistics" else sums.features("pooled")
    spatial = None if sums.spatial is None else moments(sums.spatial)
    with replacing(path) as temporary:
        if features is None:
            write_statistics(temporary, moments(sums.pooled), sums.n, facts, spatial)
        else:
            write_features(temporary, features, facts, spatial)
    return "statistics" if features is None else "features"


@dataclass
class OnlineReference:
    """What a run's images are compared with; it is held on rank 0 alone.

    Args:
        walk: the validation split's originals.
        extractor: loaded.
        given: file that the config names, or None for the split itself.
        images: how many of the split, 0 for all.
        bar: a progress bar where it is computed.
        file: it, on rank 0, once it is known.
        notes: warnings about it, on rank 0.
    """

    walk: SplitWalk
    extractor: Extractor
    given: str | None
    images: int = 0
    bar: bool = True
    file: FeatureFile | None = field(default=None, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def check(self) -> None:
        """Read the given file, if there is one; collective.

        Raises:
            BadInput: no such file, or one of another extractor, resize, transform or image shape.
        """
        if self.given is not None:
            on_main(self.walk.backend, self._read_given)

    def find(self, project: Path) -> None:
        """Have it: given, found in PROJECT/references, or computed and kept there; collective."""
        if self.given is not None:
            return
        facts = describe(self.walk, self.extractor, self.walk.count(self.images))
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        path, backend = project / "references" / f"{key}.npz", self.walk.backend
        known = on_main(backend, lambda: self.file is not None and self.file.path == path)
        if known:
            return
        if not on_main(backend, path.exists):
            sums = measure_originals(self.walk, self.extractor, self.images, bar=self.bar)
            on_main(backend, lambda: write_reference(path, sums, facts) and None)
        on_main(backend, lambda: self._take(read_features(path)))

    def _read_given(self) -> None:
        assert self.given is not None
        path = Path(self.given)
        try:
            self._take(file := read_features(path))
            self._compare(file)
        except BadInput as error:
            raise BadInput(f"online_eval.reference: {error}") from error

    def _take(self, file: FeatureFile) -> None:
        self.file = file

    def _compare(self, file: FeatureFile) -> None:
        if len(file.pooled.mean) != self.extractor.dim:
            raise BadInput(f"{file.path}: expected {self.extractor.dim} features, got {len(file.pooled.mean)}")
        self.notes = check_comparable(str(file.path), file.protocol, "this run", self.extractor.identity())
        own, made = preprocessing(self.walk), file.protocol
        if made.get("transform_sha256", own["transform_sha256"]) != own["transform_sha256"]:
            expected, got = (f"{x.get('image_shape')} by {x.get('transform')}" for x in (own, made))
            raise BadInput(f"{file.path}: expected images {expected}, got {got}")
        if "transform_sha256" not in made:
            self.notes.append(f"{file.path} does not say by which transform its images were made")
