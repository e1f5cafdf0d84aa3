"""Batches that a thread of their own fetches ahead; an error in it is raised where its batch would have come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


_END = object()


def _put(ready: queue.Queue[Any], value: object, closing: threading.Event) -> bool:
    """Wait for room in the queue; False where nobody will make any."""
    while not closing.is_set():
        try:
            ready.put(value, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _fetch(
    items: Iterable[Item], place: Callable[[Item], Any], ready: queue.Queue[Any], closing: threading.Event
) -> None:
    source, last = iter(items), _END
    try:
        for item in source:
            if not _put(ready, place(item), closing):
                break
    except BaseException as error:  # noqa: BLE001  (raised again where the batch is waited for)
        last = _Failed(error)
    finally:
        if close := getattr(source, "close", None):
            close()
        _put(ready, last, closing)


def fetched_ahead(items: Iterable[Item], place: Callable[[Item], Any], ahead: int = 4) -> Iterator[Any]:
    """`place(item)` of each item, in order, while the caller still works with those before it.

    The source is iterated, and closed where it can be, in the thread alone. That ends with the iteration, or when the
    iterator is closed.

    Args:
        items: the source.
        place: for example a copy to the device.
        ahead: how many are kept ready.

    Raises:
        BaseException: whatever the source or `place` raised, in place of the item it happened at.
    """
    ready: queue.Queue[Any] = queue.Queue(ahead)
    closing = threading.Event()
    thread = threading.Thread(target=_fetch, args=(items, place, ready, closing), name="feed", daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not _END:
            if isinstance(value, _Failed):
                raise value.error
            yield value
    finally:
        closing.set()
        thread.join()
