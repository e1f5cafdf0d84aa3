"""Random numbers that belong to a sample: (seed, sample_id, stream) -> numbers.

What a sample sees (timestep, noise, flip, posterior noise, condition drop) is a function of the run's seed, the
sample's position in the stream of samples and the name of the stream. It does not depend on the number of loader
workers, on world size, on accumulation or on where a run was resumed, and no random state has to be saved.

This module is a leaf: every room may import it, it imports none.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def fold(*key: int | str) -> int:
    """A 63-bit seed of a key such as ``(seed, "noise", sample_id)``; neighbouring keys give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


_GLOBAL = threading.RLock()


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Within this context torch's own generator, which start weights are drawn from, is at the start of `key`'s stream.

    One at a time: the generator belongs to the process, and ranks may be threads of one.
    """
    with _GLOBAL:
        torch.manual_seed(fold(*key))
        yield


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """After this context torch's own generator is as it was before.

    One at a time with `seeded`: `torch.random.fork_rng` alone, in a rank that is a thread, puts back a state that
    another rank has drawn from meanwhile, which then draws the same start weights twice.
    """
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        yield


def generator(*key: int | str) -> torch.Generator:
    """A host generator seeded with :func:`fold` of the key."""
    return torch.Generator().manual_seed(fold(*key))


class Law(Protocol):
    """A distribution: fills a shape with float32 numbers from a generator, on the generator's device."""

    def __call__(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor: ...


def normal(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float32 (the same numbers whatever the precision of the run)."""
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), float32."""
    return torch.rand(shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Draw:
    """What a module needs per sample: the shape without the batch axis, and the law of the numbers."""

    shape: tuple[int, ...]
    law: Law


def fill(draws: Mapping[str, Draw], seed: int, sample_id: int) -> dict[str, Tensor]:
    """The numbers of one sample, one tensor a stream.

    One generator is re-seeded for every stream: a new generator costs 5 times as much as a re-seeding.
    """
    host = torch.Generator()
    return {
        name: draw.law(draw.shape, generator=host.manual_seed(fold(seed, name, sample_id)))
        for name, draw in draws.items()
    }


def fill_batch(draws: Mapping[str, Draw], batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The numbers of a whole batch from one generator, on its device: fast, but they belong to no sample."""
    return {name: draw.law((batch_size, *draw.shape), generator=generator) for name, draw in draws.items()}
