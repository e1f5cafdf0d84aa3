"""Shards of latents: what to write, and the writer that encodes batches and closes a shard with its note."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from rqvae.errors import BadInput, RunFailed
from rqvae.files import file_sha256
from rqvae.img_datasets.interfaces import LabeledImageData, Split
from rqvae.img_datasets.latent_cache import named_tensors, select_variant
from rqvae.models.connectors.statistics import ChannelStatistics
from rqvae.models.interfaces import Stage1Model
from rqvae.run import AnyRun, Stage1Run
from rqvae.weight_files import write_tensors

StorageType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CacheRequest:
    """What to cache, and where.

    Args:
        out: folder of the cache.
        ckpt: run or checkpoint folder of Stage1, in place of the config's.
        splits: which splits.
        samples_per_shard: samples of one file.
        dtype: type on disk; encoding is always done in float32.
        batch_size: images of one forward, in all variants.
    """

    out: Path
    ckpt: str | None = None
    splits: tuple[Split, ...] = ("train",)
    samples_per_shard: int = 4096
    dtype: StorageType = "float32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, value in (("--shard-size", self.samples_per_shard), ("--batch-size", self.batch_size)):
            if value < 1:
                raise BadInput(f"{name}: expected at least 1, got {value}")

    def source(self, run: AnyRun) -> tuple[str | None, str]:
        """The Stage1 checkpoint, and the name under which to speak of it."""
        if self.ckpt or isinstance(run, Stage1Run):
            return self.ckpt, "--ckpt"
        return run.stage1_checkpoint, "stage1_checkpoint"


@dataclass(frozen=True)
class Shard:
    """Samples [first, stop) of a split."""

    split: Split
    number: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """Without suffix."""
        return f"{self.split}-{self.number:05d}"


def read_note(path: Path) -> dict[str, Any] | None:
    """The file's content; None where it is missing or was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@dataclass
class ShardWriter:
    """Encodes batches and writes a shard when its last one came.

    Args:
        request: type on disk and folder.
        stage1: in eval mode, on the batches' device.
    """

    request: CacheRequest
    stage1: Stage1Model
    _parts: list[dict[str, Tensor]] = field(default_factory=list, init=False)
    _statistics: ChannelStatistics = field(default_factory=ChannelStatistics, init=False)
    _checked: bool = field(default=False, init=False)

    @torch.no_grad()
    def add(self, shard: Shard, batch: LabeledImageData) -> int:
        """One batch (B, V, 3, H, W) of a shard's samples, in order.

        Returns:
            How many were kept: what is more than the shard's own samples only fills up the batch.
        """
        images_bvchw, choice_b = batch.require_img(), (batch.additional_attr or {})["choice"]
        if not self._checked:
            self._check_with_draws(images_bvchw[torch.arange(len(choice_b), device=choice_b.device), choice_b], batch)
        tensors, same = named_tensors(self.stage1.encode(LabeledImageData(img=images_bvchw.flatten(0, 1))))
        dtype = getattr(torch, self.request.dtype)
        stored = {
            name: x.unflatten(0, images_bvchw.shape[:2]).to(dtype if x.is_floating_point() else x.dtype)
            for name, x in tensors.items()
        }
        floating = [name for name, x in stored.items() if x.is_floating_point()]
        finite = torch.stack([stored[name].isfinite().all() for name in floating]).tolist()
        for name in (name for name, flag in zip(floating, finite, strict=True) if not flag):
            raise RunFailed(f"{shard.name}: {name} is not finite as {self.request.dtype} ({_ids(batch)})")
        left = shard.stop - shard.first - sum(len(part["zs"]) for part in self._parts)
        kept = min(left, len(choice_b))
        zs = self.stage1.with_draws(select_variant(stored, same, choice_b), batch.draws).zs
        self._statistics.update(zs, torch.arange(len(choice_b)) < kept)
        self._parts.append({name: x.cpu()[:kept] for name, x in stored.items()})  # cut on the host: no other program
        if kept == left:
            self._write(shard, same)
        return kept

    def _check_with_draws(self, images: Tensor, batch: LabeledImageData) -> None:
        """BadInput where a foreign Stage1 draws in `encode` what `with_draws` does not draw again."""
        expected = self.stage1.encode(LabeledImageData(img=images, draws=batch.draws)).zs
        found = self.stage1.with_draws(self.stage1.encode(LabeledImageData(img=images)), batch.draws).zs
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
            raise BadInput(
                f"stage1: {type(self.stage1).__name__}.with_draws: expected the latents that `encode` gives with "
                f"draws, got others; a model that samples in `encode` must define it to be cached"
            )
        self._checked = True

    def _write(self, shard: Shard, same: list[str]) -> None:
        tensors = {name: torch.cat([part[name] for part in self._parts]).contiguous() for name in self._parts[0]}
        file = self.request.out / f"{shard.name}.safetensors"
        count, mean, m2 = self._statistics.count, self._statistics.mean_c, self._statistics.m2_c
        assert mean is not None, "a shard has samples"
        assert m2 is not None, "it comes with the mean"
        try:
            file.with_suffix(".json").unlink(missing_ok=True)
            write_tensors(tensors, file)
            note = {
                "file": file.name,
                "samples": len(tensors["zs"]),
                "bytes": file.stat().st_size,
                "sha256": file_sha256(file),
                "tensors": {name: list(x.shape[1:]) for name, x in tensors.items()},
                "same_as_zs": same,
                "statistics": {"count": int(count), "mean": mean.tolist(), "m2": m2.tolist()},
            }
            file.with_suffix(".json").write_text(json.dumps(note))
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"{file}: not written: {str(error).splitlines()[0]}; the shards before it are whole"
            ) from error
        self._parts, self._statistics = [], ChannelStatistics()


def _ids(batch: LabeledImageData) -> str:
    assert batch.sample_id is not None, "the stream numbers its samples"
    return f"samples {int(batch.sample_id[0])} to {int(batch.sample_id[-1])}"
