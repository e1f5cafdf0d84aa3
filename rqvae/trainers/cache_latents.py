"""Stage1's latents of whole splits, written as shards on all ranks; what is there and whole is not computed again.

Shard k is computed by rank k modulo world size, in batches that do not depend on world size. A shard's note, JSON with
its size, sha256 and statistics, is written after it, and the manifest after all notes: a file that a kill cut short has
no true note and is made anew. Nothing is renamed, as in checkpoints, but `request.json`: it says what all
shards are of, and cannot be made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rqvae.backends import Backend
from rqvae.errors import BadInput
from rqvae.files import write_json
from rqvae.img_datasets.feed import make_loader
from rqvae.img_datasets.interfaces import LabeledImageData, Split
from rqvae.img_datasets.latent_cache import SCHEMA, LatentCache, VariantStream, is_whole
from rqvae.models.connectors.statistics import ChannelStatistics
from rqvae.models.interfaces import Stage1Model
from rqvae.run import AnyRun, DataSettings
from rqvae.trainers.evaluation_trainer import load_stage1
from rqvae.trainers.latent_shards import CacheRequest, Shard, ShardWriter, read_note
from rqvae.trainers.logging import setup_text_log
from rqvae.trainers.parts import on_main
from rqvae.trainers.run_folder import RunLock, changed_keys, check_can_write, make_folder
from rqvae.trainers.session import Session

log = logging.getLogger(__name__)


def check_request(run: AnyRun, request: CacheRequest) -> None:
    """BadInput for a folder that cannot be written, images of an unfit size, or a transform with too many results."""
    check_can_write(request.out, "OUT")
    for split in request.splits:
        dataset, transform = run.data.make(split)
        run.stage1.latent_shape(dataset.spec.image_shape)
        if not transform.variants:
            raise BadInput(
                f"data.{split}_transform: expected a transform that lists its variants, "
                f"got {type(transform).__name__}, which lists none: latents of random crops cannot be cached"
            )


def open_cache(data: DataSettings, stage1: Stage1Model) -> LatentCache | None:
    """The cache that the config names, if any, after what can be known without weights and data is known to fit.

    Raises:
        BadInput: no such cache, or one of another transform, image shape, Stage1 class or latent shape.
    """
    if data.cache is None:
        return None
    dataset, transform = data.make("train")
    cache = LatentCache.open(Path(data.cache), "train")
    shape = dataset.spec.image_shape
    cache.check_preprocessing(structure_of(stage1), transform, shape, stage1.latent_shape(shape))
    return cache


def open_verified(data: DataSettings, stage1: Stage1Model, sha256: str, backend: Backend) -> LatentCache | None:
    """`open_cache`, and the Stage1 weights and every shard's bytes compared; each rank reads its share of the shards.

    Raises:
        BadInput: as `open_cache`; other Stage1 weights, or a damaged shard.
    """
    cache = open_cache(data, stage1)
    if cache is not None:
        cache.check_stage1(sha256)
        cache.verify(backend.rank, backend.world_size)
    return cache


def structure_of(stage1: Stage1Model) -> str:
    """Class and structure of a model, as torch prints it: two with the same weights may differ in groups of a norm.

    One that brings its own weights is told by them alone: it is not built where only shapes are checked.
    """
    if stage1.pretrained:
        return type(stage1).__qualname__
    return f"{type(stage1).__qualname__} {hashlib.sha256(repr(stage1).encode()).hexdigest()[:12]}"


@dataclass
class CachingJob:
    """One rank's part of caching, from the config to the exit code.

    Args:
        run: the experiment whose data and Stage1 are used.
        backend: this rank, fp32.
        request: what to cache, and where.
    """

    run: AnyRun
    backend: Backend
    request: CacheRequest
    _streams: dict[Split, VariantStream] = field(default_factory=dict, init=False)

    def execute(self) -> int:
        """Every rank calls it.

        Returns:
            0, or 128 + signal where one ended the job; the same command then goes on.
        """
        setup_text_log(self.backend.rank)
        path, where = self.request.source(self.run)
        stage1_sha256 = load_stage1(self.run.stage1, path, where)
        stage1 = self.run.stage1.to(self.backend.device).eval()
        for split in self.request.splits:
            self._streams[split] = self._open(split, stage1)
        facts = self._facts(stage1_sha256)
        lock = RunLock(self.request.out)
        on_main(self.backend, lambda: self._claim(facts, lock))
        with Session(self.request.out, lock, check_seconds=2.0) as session:
            todo = self._missing()
            writer = ShardWriter(self.request, stage1)
            if not self._encode(todo, writer, session):
                log.info("%s: stopped; the same command goes on", self.request.out)
                return 128 + session.signal
            self.backend.barrier()  # another rank's last shard may still be under way
            on_main(self.backend, lambda: self._finish(facts))
        return 0

    def _open(self, split: Split, stage1: Stage1Model) -> VariantStream:
        """The split with its data, rank 0 first: it reports what is wrong, and fills caches."""
        dataset, transform = self.run.data.make(split)
        on_main(self.backend, dataset.open)
        if self.backend.rank:
            dataset.open()
        # seed 0 and file order, as where a run estimates its latents' statistics: the manifest's are the same numbers
        images = dataset.encoded_images()
        return VariantStream(images, transform, stage1.draws(images.spec.image_shape), seed=0, shuffle=False)

    def _facts(self, stage1_sha256: str) -> dict[str, Any]:
        """What the cache is of."""
        image_shape = self._streams[self.request.splits[0]].dataset.spec.image_shape
        return {
            "schema": SCHEMA,
            "stage1": structure_of(self.run.stage1),
            "stage1_sha256": stage1_sha256,
            "image_shape": list(image_shape),
            "latent_shape": list(self.run.stage1.latent_shape(image_shape)),
            "dtype": self.request.dtype,
            "encoder_precision": "float32",
            "samples_per_shard": self.request.samples_per_shard,
            "splits": {
                split: {
                    "samples": len(stream),
                    "fingerprint": stream.dataset.fingerprint(),
                    "transform": stream.transform.fingerprint(),
                    "variants": list(stream.transform.variants),
                }
                for split, stream in self._streams.items()
            },
        }

    def _claim(self, facts: dict[str, Any], lock: RunLock) -> None:
        """Make the folder and hold its lock; refuse one that holds other latents."""
        out, note = self.request.out, self.request.out / "request.json"
        make_folder(out, "OUT")
        lock.acquire()
        held = read_note(note)
        if held is not None:
            if rows := changed_keys(held, facts):
                raise BadInput(f"OUT {out}: holds other latents ({'; '.join(rows)}); use another folder or remove it")
            return
        own = (".lock", ".heartbeat", ".request.", note.name)
        if any(not path.name.startswith(own) for path in out.iterdir()):
            if note.exists():
                raise BadInput(
                    f"{note}: expected a JSON object that says what the shards are of, got a damaged file; "
                    f"put it back, use another folder or remove this one"
                )
            raise BadInput(f"OUT {out}: expected an empty folder or one of this cache, got one with other files")
        write_json(note, facts)

    def _shards(self) -> list[Shard]:
        """All shards of all splits, in the order in which they are dealt to the ranks."""
        size = self.request.samples_per_shard
        return [
            Shard(split, k, first, min(first + size, len(stream)))
            for split, stream in self._streams.items()
            for k, first in enumerate(range(0, len(stream), size))
        ]

    def _missing(self) -> list[Shard]:
        """This rank's shards that are not there, or not whole."""
        out, todo = self.request.out, []
        mine = self._shards()[self.backend.rank :: self.backend.world_size]
        for shard in mine:
            file, note = out / f"{shard.name}.safetensors", read_note(out / f"{shard.name}.json")
            if note is None or not is_whole(file, note):
                todo.append(shard)
                if file.exists():
                    log.warning("%s: half-written or damaged, made anew", file)
        counts = torch.tensor([len(mine), len(todo)], device=self.backend.device)
        known, new = (int(n) for n in self.backend.all_reduce(counts))
        log.info("%s: %d of %d shards are there", out, known - new, known)
        if new:
            on_main(self.backend, lambda: (out / "manifest.json").unlink(missing_ok=True))
        return todo

    def _batches(self, todo: list[Shard]) -> Iterator[tuple[Shard, LabeledImageData]]:
        size = self.request.batch_size
        for split, stream in self._streams.items():
            cuts = [(shard, k) for shard in todo if shard.split == split for k in range(shard.first, shard.stop, size)]
            # always `size` of them, the last one again where a shard has no more: one shape, hence one program, for all
            positions = [[min(i, shard.stop - 1) for i in range(k, k + size)] for shard, k in cuts]
            loader = self.backend.feed(make_loader(stream, positions, self.run.data.workers if positions else 0))
            yield from zip((shard for shard, _ in cuts), loader, strict=True)

    def _encode(self, todo: list[Shard], writer: ShardWriter, session: Session) -> bool:
        """Write the shards; False where a signal stopped it.

        The ranks go in step: they vote on stopping, and none waits for another longer than a collective may.
        """
        images = sum(shard.stop - shard.first for shard in todo)
        rounds = torch.tensor(sum(-(-(s.stop - s.first) // self.request.batch_size) for s in todo))
        rounds = self.backend.all_reduce(rounds.to(self.backend.device), "max")
        batches = self._batches(todo)
        with tqdm(total=images, desc="cache-latents", unit="image", disable=self.backend.rank > 0) as bar:
            for _ in range(int(rounds)):
                if session.stopping(self.backend):
                    return False
                if (item := next(batches, None)) is not None:
                    bar.update(writer.add(*item))
        return True

    def _finish(self, facts: dict[str, Any]) -> None:
        """Put the notes together."""
        notes = {shard: read_note(self.request.out / f"{shard.name}.json") for shard in self._shards()}
        manifest = json.loads(json.dumps(facts))
        for split, entry in manifest["splits"].items():
            statistics = ChannelStatistics()
            entry["shards"] = []
            for shard, note in notes.items():
                if shard.split != split:
                    continue
                assert note is not None, "every rank has written its shards"
                known = note["statistics"]
                mean_c, m2_c = (torch.tensor(known[k], dtype=torch.float64) for k in ("mean", "m2"))
                statistics.merge(known["count"], mean_c, m2_c)
                entry["shards"].append({key: note[key] for key in ("file", "samples", "bytes", "sha256")})
                manifest["tensors"], manifest["same_as_zs"] = note["tensors"], note["same_as_zs"]
            count, mean, std = statistics.reduced(lambda x: x)
            entry["statistics"] = {"values_per_channel": count, "mean": mean.tolist(), "std": std.tolist()}
        (self.request.out / "manifest.json").write_text(json.dumps(manifest, indent=1))
