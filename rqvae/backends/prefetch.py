"""The next batch on its way to the device while the present one is computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Begun = TypeVar("Begun")
Result = TypeVar("Result")


def one_ahead(
    items: Iterable[Item], begin: Callable[[Item], Begun], finish: Callable[[Begun], Result]
) -> Iterator[Result]:
    """`finish(begin(item))` of each item in order, where `begin` of an item comes before `finish` of the one before it.

    An error of the source, or of `begin`, is raised where its own item would have come, after all items before it.

    Args:
        items: the source.
        begin: starts something that takes time, and does not wait for it.
        finish: waits for it.
    """
    source = iter(items)
    waiting: list[Begun] = []
    while True:
        try:
            waiting.append(begin(next(source)))
        except StopIteration:
            break
        except Exception:
            if waiting:
                yield finish(waiting.pop())
            raise
        if len(waiting) == 2:
            yield finish(waiting.pop(0))
    for begun in waiting:
        yield finish(begun)
