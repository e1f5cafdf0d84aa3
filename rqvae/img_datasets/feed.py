"""The feed: this rank's micro-batches of each optimizer step. Its whole state is one integer, the images consumed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import LabeledImageData, LabeledImageDatasetWrapper
from rqvae.processes import STOP_SIGNALS, die_with_parent


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
    """A loader worker computes on one thread and goes when its trainer goes.

    Signals that reach the whole process group are the trainer's to answer: it still needs batches for its last step. A
    worker follows a SIGTERM half a minute later, as Python joins workers that it has terminated at its exit.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # where the trainer is not its process's main thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _Refusal:
    """A BadInput on its way out of a loader worker, where raising it would wrap it in the worker's traceback."""

    message: str


@dataclass
class _Guarded(Dataset[Any]):
    """A stream whose mistakes are values."""

    stream: LabeledImageDatasetWrapper

    def __getitem__(self, position: int) -> LabeledImageData | _Refusal:
        try:
            return self.stream[position]
        except BadInput as error:
            return _Refusal(str(error))

    def collate(self, samples: Sequence[LabeledImageData | _Refusal]) -> LabeledImageData | _Refusal:
        refusals = [sample for sample in samples if isinstance(sample, _Refusal)]
        try:
            return refusals[0] if refusals else self.stream.collate_fn(samples)  # type: ignore[arg-type]
        except BadInput as error:
            return _Refusal(str(error))


def make_loader(
    stream: LabeledImageDatasetWrapper, positions: Iterable[list[int]], workers: int, pin_memory: bool = False
) -> Iterator[LabeledImageData]:
    """The batches of the stream's samples at `positions`, in order, whatever the number of workers.

    Raises:
        BadInput: while iterating, a sample that cannot be read.
    """
    guarded = _Guarded(stream)
    options: dict[str, Any] = {"worker_init_fn": _start_worker, "prefetch_factor": 4} if workers else {}
    loader: DataLoader[Any] = DataLoader(
        guarded,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=guarded.collate,
        pin_memory=pin_memory,
        # its own: the process's may be drawing start weights for another rank, which is a thread of the same process
        generator=torch.Generator(),
        **options,
    )
    for batch in loader:
        if isinstance(batch, _Refusal):
            raise BadInput(batch.message)
        yield batch


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

    def close(self) -> None:
        """Send the loader's workers home."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def next_step(self) -> list[LabeledImageData]:
        """The micro-batches of the next optimizer step, on the device."""
        return [next(self._batches) for _ in range(self.accumulate)]
