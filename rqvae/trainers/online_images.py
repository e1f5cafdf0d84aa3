"""The images that are scored while a run trains: reconstructions of a split, or samples with noise keyed by number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rqvae.diffusion.sampling import Sampler
from rqvae.img_datasets.feed import Positions
from rqvae.img_datasets.interfaces import Condition, DataSpec
from rqvae.models.interfaces import Stage1Model
from rqvae.models.two_stage import TwoStage
from rqvae.trainers.evaluation_trainer import SplitWalk, reconstruct
from rqvae.trainers.generate import condition_of, noise_of, sampler_facts


@dataclass(frozen=True)
class MadeBatch:
    """This rank's part of the images.

    Args:
        images_bchw: in [0, 1].
        ids_b: int64, each image's number.
        valid_b: bool, False for images that only fill up the batch.
        originals_bchw: what was reconstructed, or None.
    """

    images_bchw: Tensor
    ids_b: Tensor
    valid_b: Tensor
    originals_bchw: Tensor | None = None


class ImageMaker(Protocol):
    """Where the images come from.

    `distance`: name of their Fréchet distance in the features of FID's network.
    """

    distance: str

    def count(self) -> int:
        """How many there are, over all ranks."""
        ...

    def batches(self) -> Iterator[MadeBatch]:
        """This rank's; every rank gives as many batches."""
        ...

    def labels(self) -> Tensor | None:
        """(N,) classes that they were generated for, where they were."""
        ...

    def facts(self) -> dict[str, Any]:
        """How they are made, under the names of `rqvae.metrics.protocol.GENERATION`."""
        ...


@dataclass
class Reconstructions:
    """The first images of a split through an autoencoder, from the deterministic encoding."""

    stage1: Stage1Model
    walk: SplitWalk
    images: int = 0
    distance = "rfid"

    def count(self) -> int:
        return self.walk.count(self.images)

    def batches(self) -> Iterator[MadeBatch]:
        for batch, valid in self.walk.batches(self.images):
            assert batch.sample_id is not None
            original = batch.require_img()
            yield MadeBatch(reconstruct(self.stage1, original), batch.sample_id, valid, original)

    def labels(self) -> Tensor | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"seed_rule": "no random numbers: the encoding's mean"}


@dataclass
class Samples:
    """Generated images; image i is a function of (weights, seed, i) and its condition, whatever the number of ranks.

    Classes and actions are taken in turn, so that their counts differ by one at most. Where a condition is more than a
    number (frames, masks), image i has that of the validation split's image i.

    Args:
        two_stage: the model.
        spec: of the data.
        walk: the validation split, and images of a forward.
        seed: of the noise.
        images: how many; 0 is as many as the split has.
        nfe: function evaluations of a sample, once there are some.
    """

    two_stage: TwoStage
    spec: DataSpec
    walk: SplitWalk
    seed: int
    images: int = 0
    nfe: int | None = field(default=None, init=False)
    distance = "gfid"

    @property
    def _in_turn(self) -> bool:
        return not self.spec.context and not self.spec.num_mask_classes

    def count(self) -> int:
        return self.images if self.images and self._in_turn else self.walk.count(self.images)

    def batches(self) -> Iterator[MadeBatch]:
        total, backend = self.count(), self.walk.backend
        if not self._in_turn:
            for batch, valid in self.walk.batches(total):
                assert batch.sample_id is not None
                yield self._generate(batch.condition, batch.sample_id, valid)
            return
        per_step = self.walk.per_rank * backend.world_size
        for numbers in Positions(0, total, per_step, 1, backend.rank, backend.world_size):
            ids = torch.tensor(numbers)
            condition = condition_of(self.spec, self._labels_of(ids))
            yield self._generate(condition and condition.to(backend.device), ids, ids < total)

    def _generate(self, condition: Condition | None, ids_b: Tensor, valid_b: Tensor) -> MadeBatch:
        noise = noise_of(self.two_stage.latent_shape, self.seed, int(ids_b[0]), len(ids_b))
        noise = noise.to(self.walk.backend.device, self.walk.dtype)
        output = self.two_stage.sample(condition, noise)
        self.nfe = output.nfe
        return MadeBatch(self.two_stage.decode(output), ids_b, valid_b)

    def _labels_of(self, ids_b: Tensor) -> Tensor | None:
        classes = self.spec.num_classes or self.spec.num_actions
        return ids_b % classes if classes else None

    def labels(self) -> Tensor | None:
        return self._labels_of(torch.arange(self.count())) if self._in_turn else None

    def facts(self) -> dict[str, Any]:
        sampler = getattr(self.two_stage.stage2, "sampler", None)
        given = "in turn, image i has class i modulo their number" if self.labels() is not None else "none"
        return {
            "labels_policy": given if self._in_turn else "conditions of the validation split's images",
            **sampler_facts(sampler if isinstance(sampler, Sampler) else None),
            "nfe": self.nfe,
            "seed_rule": f"noise of image i is a function of ({self.seed}, i), the same at every evaluation",
        }
