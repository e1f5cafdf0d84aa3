"""Walking a split on all ranks, and what is computed on the way: scores and grids of reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rqvae.backends import Backend
from rqvae.errors import BadInput, RunFailed
from rqvae.img_datasets.feed import Positions, make_loader
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDatasetWrapper, Split
from rqvae.metrics.grids import image_grid
from rqvae.metrics.reconstruction import to_uint8
from rqvae.models.interfaces import Stage1Model
from rqvae.randomness import Draw
from rqvae.run import DataSettings
from rqvae.trainers import checkpoint
from rqvae.trainers.fetching import fetched


@dataclass
class SplitWalk:
    """One pass over a split, spread over the ranks, in batches of one shape.

    Args:
        data: dataset, transforms and batch size.
        split: which split; its dataset is opened at the first pass.
        backend: this rank.
        dtype: of the images.
        draws: random numbers of each sample, where the encoder is to sample as in training.
        per_rank: images of a rank's batch; 0 is `data.batch_size` over the ranks. Batches of one shape for any number
            of ranks give the same floats.
    """

    data: DataSettings
    split: Split
    backend: Backend
    dtype: torch.dtype = torch.float32
    draws: dict[str, Draw] = field(default_factory=dict)
    per_rank: int = 0
    _stream: LabeledImageDatasetWrapper | None = field(default=None, init=False)

    @property
    def stream(self) -> LabeledImageDatasetWrapper:
        """The split in file order, opened."""
        if self._stream is None:
            dataset, transform = self.data.make(self.split)
            dataset.open()
            self._stream = LabeledImageDatasetWrapper(dataset, transform, self.draws, seed=0, shuffle=False)
        return self._stream

    def batches(self, images: int = 0) -> Iterator[tuple[LabeledImageData, Tensor]]:
        """This rank's batches and a mask (B,) of the samples that count.

        The last batch is filled up with samples that do not count, so that every batch has one shape.

        Args:
            images: how many images of the split, 0 for all.
        """
        total = self.count(images)
        world = self.backend.world_size
        per_step = world * (self.per_rank or max(1, self.data.batch_size // world))
        positions = Positions(0, total, per_step, 1, self.backend.rank, world)
        loader = make_loader(self.stream, positions, self.data.workers)
        for batch in self.backend.feed(loader):
            yield batch, batch.sample_id < total

    def count(self, images: int = 0) -> int:
        """How many images `batches(images)` visits."""
        return min(images or len(self.stream), len(self.stream))

    def first(self, images: int) -> LabeledImageData:
        """The first `images` samples as one batch, the same on every rank."""
        return self._batch(range(min(images, len(self.stream))))

    def spread(self, images: int) -> LabeledImageData:
        """`images` samples at equal distances over the split as one batch, the same on every rank and at every call."""
        count = min(images, len(self.stream))
        return self._batch([i * len(self.stream) // count for i in range(count)])

    def _batch(self, positions: Sequence[int]) -> LabeledImageData:
        samples = [self.stream[i] for i in positions]
        return self.stream.collate_fn(samples).to(self.backend.device, self.dtype)


@torch.no_grad()
def reconstruct(stage1: Stage1Model, images: Tensor) -> Tensor:
    """(B, 3, H, W) reconstructions as they are shown and scored, from the deterministic encoding."""
    return stage1.get_recon_imgs(stage1(LabeledImageData(img=images)).xs_recon)


def as_pictures(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) uint8 on the host."""
    return to_uint8(images).cpu().numpy()


def finite_pictures(images_bchw: Tensor, raw: Tensor, numbers: Sequence[int], what: str) -> np.ndarray:
    """`as_pictures` of images whose model gave finite numbers; NaN would be written as black and look like an image.

    The flags travel in the same tensor as the pictures, so that the device is read once.

    Args:
        images_bchw: (B, 3, H, W) in [0, 1], of which the first `len(numbers)` count.
        raw: (B, ...) what the images were made from, before it was clamped, which turns infinity into white.
        numbers: of the images that count, for the error.
        what: they are, for the error.

    Raises:
        RunFailed: images that count are not finite.
    """
    finite_b = images_bchw.isfinite().flatten(1).all(1) & raw.isfinite().flatten(1).all(1)
    flat = to_uint8(images_bchw).flatten(1)
    rows = torch.cat([flat, finite_b[:, None].to(flat.dtype)], 1).cpu().numpy()
    if broken := int((rows[: len(numbers), -1] == 0).sum()):
        raise RunFailed(f"{what} {min(numbers)} to {max(numbers)}: {broken} of {len(numbers)} images are not finite")
    return rows[:, :-1].reshape(images_bchw.shape)


def reconstruction_grid(stage1: Stage1Model, walk: SplitWalk, images: int) -> np.ndarray:
    """(H, W, 3) uint8: originals above, reconstructions below."""
    original = walk.first(images).require_img()
    recon = reconstruct(stage1, original)
    return image_grid(as_pictures(torch.cat([original.clamp(0, 1), recon])), columns=len(original))


def load_stage1(stage1: Stage1Model, path: str | None, where: str = "stage1_checkpoint") -> str:
    """Load the evaluated weights (EMA where there is one) of a Stage1 run and return their sha256.

    Raises:
        BadInput: no checkpoint for a model that has parameters and brings no weights itself, or one of another
            architecture.
    """
    if path is None:
        if not stage1.pretrained and any(True for _ in stage1.parameters()):
            raise BadInput(f"{where}: expected a run or checkpoint folder for {type(stage1).__name__}, got null")
    elif ((folder := fetched(path)) / "stage1" / "model.safetensors").exists():  # what `python -m rqvae export` wrote
        checkpoint.load_into(stage1, checkpoint.read(folder, "stage1/model"), f"{path}/stage1/model.safetensors")
    else:
        load_evaluated(stage1, "stage1", folder)
    return checkpoint.tensors_sha256(stage1.state_dict())


def load_evaluated(module: nn.Module, name: str, path: Path, weights: str | None = None) -> Path:
    """Load a module's weights and return the checkpoint's folder.

    Args:
        module: of the architecture that the run has.
        name: of its file, for example stage1.
        path: run or checkpoint folder.
        weights: `model` or an average such as `ema_0.999`; None is what the run evaluates (its first EMA, if any).
    """
    folder = checkpoint.find(path)
    chosen = checkpoint.weights_of(folder, weights)
    tensors = checkpoint.read(folder, f"model/{name}")
    if chosen != "model":
        tensors |= checkpoint.read(folder, f"{chosen}/{name}")
    own = module.state_dict()
    tensors = {k: v.to(own[k].dtype) if k in own else v for k, v in tensors.items()}
    checkpoint.load_into(module, tensors, str(folder / "model" / name))
    return folder
