"""Smallest sets of units that fail together, from a test of any set of them.

Nothing here knows models: a test is a function of a set, which the diagnostic answers with one decode of units that are
compiled already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Fails = Callable[[Sequence[T]], bool]


def prefix_bisection(items: Sequence[T], fails: Fails[T], most: int = 16) -> list[T] | None:
    """A minimal failing set by bisecting prefixes, where failing is monotone: more units never heal.

    The last item of the shortest failing prefix is in the set; with it fixed, a shorter prefix suffices, and so on.
    Takes about log2(len(items)) + 1 tests per item found: some 16 for a pair among 83, where the delta debugging of
    Zeller & Hildebrandt 2002 ("Simplifying and Isolating Failure-Inducing Input") takes some 60.

    Args:
        items: in the order in which the units are called; all of them together fail.
        fails: whether a set fails.
        most: items to look for.

    Returns:
        The set, in the order of `items`; None where failing turned out not to be monotone.
    """
    found: list[T] = []
    end = len(items)
    while len(found) < most:
        if found and fails(found):
            return sorted(found, key=items.index)
        if end == 0:
            return None
        low, high = 1, end  # the shortest prefix that fails with `found` has a length within [low, high]
        while low < high:
            middle = (low + high) // 2
            if fails([*items[:middle], *found]):
                high = middle
            else:
                low = middle + 1
        found.append(items[low - 1])
        end = low - 1
    return None


def delta_debugging(items: Sequence[T], fails: Fails[T]) -> list[T]:
    """A set that fails and from which no single item can be taken: ddmin of Zeller & Hildebrandt 2002, figure 1.

    Args:
        items: a set that fails.
        fails: whether a set fails.
    """
    current, parts = list(items), 2
    while len(current) >= 2:
        size = -(-len(current) // parts)
        subsets = [current[i : i + size] for i in range(0, len(current), size)]
        complements = [[x for x in current if x not in subset] for subset in subsets]
        smaller = next((s for s in subsets if fails(s)), None)
        if smaller is not None:
            current, parts = smaller, 2
            continue
        smaller = next((c for c in complements if parts > 2 and fails(c)), None)
        if smaller is not None:
            current, parts = smaller, max(parts - 1, 2)
        elif parts < len(current):
            parts = min(len(current), 2 * parts)
        else:
            break
    return current


def smallest_failing(items: Sequence[T], fails: Fails[T]) -> list[T]:
    """A small failing subset of a failing set: prefix bisection, and delta debugging where failing is not monotone.

    A set of more than three is taken as a sign of that and is reduced; a smaller one is not, for want of decodes.
    """
    found = prefix_bisection(items, fails)
    if found is None:
        return delta_debugging(items, fails)
    return found if len(found) <= 3 else sorted(delta_debugging(found, fails), key=items.index)


def all_smallest_failing(items: Sequence[T], fails: Fails[T], most: int = 8) -> list[list[T]]:
    """Disjoint minimal failing sets, until what is left does not fail.

    Args:
        items: in call order.
        fails: whether a set fails.
        most: sets to look for.
    """
    left = list(items)
    sets: list[list[T]] = []
    while left and len(sets) < most and fails(left):
        found = smallest_failing(left, fails)
        sets.append(found)
        left = [item for item in left if item not in found]
    return sets
