"""Latents of a dataset on disk, read in place of its images: `python -m rqvae cache-latents` writes them.

    OUT/manifest.json  train-00000.safetensors  train-00000.json  train-00001.safetensors ...

A shard holds what Stage1 gives for consecutive samples, without any random number, for each variant of the train
transform: tensors (N, V, ...) named `zs`, `logvar` and so on. The manifest is written last; what it does not say,
nobody may assume: which Stage1, transform, image shape and data the latents are of, and each shard's size and sha256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.files import file_sha256
from rqvae.img_datasets.interfaces import (
    ImageShape,
    LabeledImageData,
    LabeledImageDatasetWrapper,
    LatentShape,
    Split,
    Stage1Encodings,
    Transform,
)
from rqvae.randomness import fill, generator

SCHEMA = 1
"""Version of the layout that this reader knows (`manifest.json`, key `schema`)."""

REPAIR = "the same `cache-latents` command again writes it anew"


class VariantStream(LabeledImageDatasetWrapper):
    """The split in file order with all variants of each image: `img` (V, 3, H, W), and in `additional_attr` the choice.

    The chosen variant and the draws are those of a `LabeledImageDatasetWrapper` of the same seed.
    """

    def __getitem__(self, position: int) -> LabeledImageData:
        """One sample; BadInput where the transform gives something else than the variant that it says it chooses."""
        stored, key = self.dataset[position], (self.seed, "augment", position)
        choice = self.transform.choose(generator(*key))
        count = len(self.transform.variants)
        images = torch.stack([self.transform.variant(stored, torch.tensor(k)).require_img() for k in range(count)])
        if not torch.equal(images[int(choice)], self.transform(stored, generator(*key)).require_img()):
            name = type(self.transform).__name__
            raise BadInput(
                f"data.train_transform: {name}: expected the result to be the variant that `choose` names, got another "
                f"one at sample {position}; such a transform must not list variants"
            )
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return LabeledImageData(
            img=images,
            additional_attr={"choice": choice},
            sample_id=torch.tensor(position),
            draws=fill(self.draws, self.seed, position) or None,
        )

    @property
    def collate_fn(self) -> Any:
        """The default one: a dataset's own may need what is not here."""
        return self.default_collate_fn


@dataclass
class LatentCache:
    """A split's latents: `read(index, choice)`; loader workers open the shards for themselves.

    Args:
        folder: where manifest.json is.
        split: which split.
        manifest: its content.
    """

    folder: Path
    split: Split
    manifest: dict[str, Any]
    _shards: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, folder: Path, split: Split) -> LatentCache:
        """Read the manifest and look whether every shard has its size.

        Raises:
            BadInput: no complete cache, one without this split, or a shard that is missing or of another size.
        """
        path = folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            schema, splits = manifest["schema"], manifest["splits"]
        except FileNotFoundError:
            raise BadInput(
                f"data.latents: {path}: expected a complete latent cache, got no such file; "
                f"run: python -m rqvae cache-latents CONFIG {folder}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"data.latents: {path}: expected a manifest of latents, got {error!r}; {REPAIR}") from error
        if schema != SCHEMA:
            raise BadInput(f"data.latents: {path}: schema: expected {SCHEMA}, got {schema}")
        if split not in splits:
            raise BadInput(f"data.latents: {path}: expected the split {split}, got {', '.join(splits)}")
        cache = cls(folder, split, manifest)
        for shard in cache.shards:
            found = folder / shard["file"]
            size = found.stat().st_size if found.is_file() else "no such file"
            if size != shard["bytes"]:
                raise BadInput(f"data.latents: {found}: expected {shard['bytes']} bytes, got {size}; {REPAIR}")
        return cache

    @property
    def shards(self) -> list[dict[str, Any]]:
        """File, samples, bytes and sha256 of each."""
        return self.manifest["splits"][self.split]["shards"]

    @property
    def rounded_to(self) -> str | None:
        """The type on disk where it holds less than float32."""
        return None if self.manifest["dtype"] == "float32" else self.manifest["dtype"]

    def __len__(self) -> int:
        return int(self.manifest["splits"][self.split]["samples"])

    def check_preprocessing(
        self, stage1: str, transform: Transform, image_shape: ImageShape, shape: LatentShape
    ) -> None:
        """BadInput unless the latents are of images so prepared and of this shape.

        Args:
            stage1: the model's class and structure.
            transform: of the split.
            image_shape: (3, H, W).
            shape: of a latent, without batch.
        """
        own = self.manifest["splits"][self.split]
        found = (self.manifest["image_shape"], own["transform"], self.manifest["stage1"], self.manifest["latent_shape"])
        expected = (list(image_shape), transform.fingerprint(), stage1, list(shape))
        for what, has, needs in zip(("image shape", "transform", "Stage1", "shape"), found, expected, strict=True):
            if has != needs:
                raise BadInput(f"data.latents: {self.folder}: expected latents of {what} {needs}, got of {has}")

    def check_stage1(self, sha256: str) -> None:
        """BadInput unless the latents are of the Stage1 weights with this hash."""
        found = self.manifest["stage1_sha256"]
        if found != sha256:
            raise BadInput(
                f"data.latents: {self.folder}: expected latents of the Stage1 weights {sha256[:12]}, "
                f"got of {found[:12]}"
            )

    def check_data(self, fingerprint: str) -> None:
        """BadInput unless the latents are of the data with this fingerprint."""
        found = self.manifest["splits"][self.split]["fingerprint"]
        if found != fingerprint:
            raise BadInput(f"data.latents: {self.folder}: expected latents of the data {fingerprint}, got of {found}")

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """BadInput unless this rank's share of the shards has the sha256 that the manifest lists."""
        for shard in self.shards[rank::world_size]:
            path = self.folder / shard["file"]
            if (found := file_sha256(path)) != shard["sha256"]:
                raise BadInput(
                    f"data.latents: {path}: expected sha256 {shard['sha256'][:12]}..., got {found[:12]}...; {REPAIR}"
                )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std (C,) float64 of the latents that training sees: flips and posterior noise included."""
        known = self.manifest["splits"][self.split]["statistics"]
        return torch.tensor(known["mean"], dtype=torch.float64), torch.tensor(known["std"], dtype=torch.float64)

    def read(self, index: int, choice: Tensor) -> Stage1Encodings:
        """The latent of a sample's variant and its moments, without batch axis; floating-point ones as float32.

        Args:
            index: of the sample in the dataset.
            choice: int64, no axes, which variant.

        Raises:
            BadInput: a shard that cannot be read.
        """
        number, row = divmod(index, int(self.manifest["samples_per_shard"]))
        columns = self._columns(number)
        try:
            # index_select and not [choice]: the choice is never read on the host
            found = {name: c[row].index_select(0, choice[None])[0] for name, c in columns.items()}
        except (SafetensorError, IndexError) as error:
            raise BadInput(f"data.latents: {self._path(number)}: sample {index} cannot be read: {error}") from error
        return _as_encodings({name: _full(x) for name, x in found.items()}, self.manifest["same_as_zs"])

    def _columns(self, number: int) -> dict[str, Any]:
        """A shard's tensors, open: to open it anew for each sample takes 6 times as long as to read one from it."""
        if number not in self._shards:
            path = self._path(number)
            try:
                handle = safe_open(path, framework="pt")
                self._shards[number] = {name: handle.get_slice(name) for name in self.manifest["tensors"]}
            except (OSError, SafetensorError) as error:
                raise BadInput(f"data.latents: {path}: expected a shard of latents, got {error}; {REPAIR}") from error
        return self._shards[number]

    def _path(self, number: int) -> Path:
        return self.folder / self.shards[number]["file"]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # open files do not travel to workers


def named_tensors(encodings: Stage1Encodings) -> tuple[dict[str, Tensor], list[str]]:
    """What must be stored of encodings, and the names of attributes that are `zs` itself (a posterior's mean).

    Raises:
        BadInput: an attribute that is not a tensor with the batch as its first axis.
    """
    tensors, same = {"zs": encodings.zs}, []
    for name, value in (encodings.additional_attr or {}).items():
        if value is encodings.zs:
            same.append(name)
        elif isinstance(value, Tensor) and value.ndim and len(value) == len(encodings.zs) and name != "zs":
            tensors[name] = value
        else:
            raise BadInput(f"stage1: additional_attr.{name}: expected a tensor (B, ...) to cache, got {type(value)}")
    return tensors, same


def _as_encodings(tensors: Mapping[str, Tensor], same_as_zs: list[str]) -> Stage1Encodings:
    """The inverse of `named_tensors`."""
    zs = tensors["zs"]
    more = {name: x for name, x in tensors.items() if name != "zs"} | dict.fromkeys(same_as_zs, zs)
    return Stage1Encodings(zs, more or None)


def select_variant(tensors: Mapping[str, Tensor], same_as_zs: list[str], choice_b: Tensor) -> Stage1Encodings:
    """A batch (B, V, ...) as `LatentCache.read` and collating would give it under these choices (B,)."""
    rows = torch.arange(len(choice_b), device=choice_b.device)
    return _as_encodings({name: _full(x[rows, choice_b]) for name, x in tensors.items()}, same_as_zs)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def is_whole(path: Path, note: Mapping[str, Any]) -> bool:
    """Whether a shard's file has the size and the sha256 that its note says."""
    return path.is_file() and path.stat().st_size == note["bytes"] and file_sha256(path) == note["sha256"]
