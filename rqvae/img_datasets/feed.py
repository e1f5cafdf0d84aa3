"""The feed: this rank's micro-batches of each optimizer step. Its whole state is one integer, the images consumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDatasetWrapper
from rqvae.processes import die_with_parent


@dataclass(frozen=True)
class Positions(Sampler[list[int]]):
    """This rank's positions in the stream of samples, one micro-batch at a time.

    Micro-batch m of a step is the m-th contiguous slice of its `batch_size` images, split over the ranks: the images
    of a step, and of a micro-batch, do not depend on world size.

    Args:
        start: images consumed before.
        stop: images after which the stream ends; None for an endless one.
        batch_size: images of one optimizer step over all ranks.
        accumulate: micro-batches of a step.
    """

    start: int
    stop: int | None
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_batch(self.batch_size, self.accumulate, self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        part = micro // self.world_size
        first = self.start
        while self.stop is None or first < self.stop:
            for m in range(self.accumulate):
                begin = first + m * micro + self.rank * part
                yield list(range(begin, begin + part))
            first += self.batch_size


def check_batch(batch_size: int, accumulate: int, world_size: int) -> None:
    """Raise BadInput unless the batch splits evenly over micro-batches and ranks."""
    if batch_size < 1 or accumulate < 1 or batch_size % (accumulate * world_size):
        raise BadInput(
            f"data.batch_size: expected a multiple of train.accumulate x world size = {accumulate} x {world_size}, "
            f"got {batch_size}"
        )


def _start_worker(_: int) -> None:
    """A loader worker computes on one thread and goes when its trainer goes."""
    die_with_parent()
    torch.set_num_threads(1)


def make_loader(
    stream: LabeledImageDatasetWrapper, positions: Iterable[list[int]], workers: int, pin_memory: bool = False
) -> DataLoader[LabeledImageData]:
    """A loader of the stream's samples at `positions`, in order, whatever the number of workers."""
    options: dict[str, Any] = {"worker_init_fn": _start_worker, "prefetch_factor": 4} if workers else {}
    return DataLoader(
        stream,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=stream.collate_fn,
        pin_memory=pin_memory,
        **options,
    )


class Feed:
    """Training's stream of steps.

    Args:
        stream: the train split as a stream.
        positions: this rank's part of it.
        workers: loader processes.
        place: puts an iterable of batches onto the device (`backend.feed`).
        pin_memory: page-locked batches, for devices that copy them asynchronously.
    """

    def __init__(
        self,
        stream: LabeledImageDatasetWrapper,
        positions: Positions,
        workers: int,
        place: Callable[[Iterable[LabeledImageData]], Iterator[LabeledImageData]],
        pin_memory: bool = False,
    ) -> None:
        self.accumulate = positions.accumulate
        self._batches = place(make_loader(stream, positions, workers, pin_memory))

    def next_step(self) -> list[LabeledImageData]:
        """The micro-batches of the next optimizer step, on the device."""
        return [next(self._batches) for _ in range(self.accumulate)]
