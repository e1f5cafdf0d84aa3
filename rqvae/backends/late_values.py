"""Values that are read once the device has been given more work, so that reading them leaves it busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """What `torch.cuda.Event` has: a mark in the device's queue."""

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class _Waiting:
    fn: Callable[..., None]
    names: tuple[str, ...]
    values_n: Tensor
    arrived: Event | None


class LateValues:
    """A queue of functions that wait for values of the device; `deliver` calls them in the order of `add`.

    When they are called is the caller's choice and not the device's, since they may communicate: all ranks must call
    them at the same place.

    Args:
        copy: starts a copy to the host; gives the host's tensor, and the event after which it holds the values.
        dtype: in which the values are copied.
    """

    def __init__(self, copy: Callable[[Tensor], tuple[Tensor, Event]], dtype: torch.dtype = torch.float64) -> None:
        self._copy, self._dtype = copy, dtype
        self._queue: deque[_Waiting] = deque()

    def add(self, fn: Callable[..., None], tensors: dict[str, Tensor]) -> None:
        """Keep `fn` and the scalars' values as of now: what is done to a tensor afterwards does not change them."""
        values_n: Tensor = torch.empty(0)
        arrived: Event | None = None
        if tensors:
            stacked_n = torch.cat([x.detach().to(self._dtype).reshape(1) for x in tensors.values()])
            values_n, arrived = self._copy(stacked_n)
        self._queue.append(_Waiting(fn, tuple(tensors), values_n, arrived))

    def add_whole(self, fn: Callable[[Tensor], None], x: Tensor) -> None:
        """Keep `fn` and the content of `x` as of now; it is called with a tensor of the host, of x's shape and type."""
        host_n, arrived = self._copy(x.detach().flatten())
        self._queue.append(_Waiting(lambda: fn(host_n.view(x.shape)), (), torch.empty(0), arrived))

    def deliver(self) -> None:
        """Wait for each function's values and call it with them as floats.

        What a function raises comes out here; those after it stay in the queue.
        """
        while self._queue:
            first = self._queue.popleft()
            if first.arrived is not None:
                first.arrived.synchronize()
            first.fn(**dict(zip(first.names, first.values_n.tolist(), strict=True)))
