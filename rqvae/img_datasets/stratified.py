"""Splits of images with several labels each: a group is in one split, and every split has the same mix of labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def held_out(groups: Mapping[str, Sequence[frozenset[int]]], share: float, salt: str) -> set[str]:
    """Groups (slides, or single images) that make up `share` of the images, stratified by their labels.

    The groups are ordered by stratum, the set of all labels of their images, and within it by a hash of their name.
    Walking along, a group is taken where the images that are due exceed those taken by half of the group or more. So
    each stratum is split like the whole, up to one group, and the choice depends on names, labels and `salt` alone.
    A split by the lists of single classes, in which an image with k labels stands k times, puts the same image into
    both splits with probability 1 - share^(k-1).

    Args:
        groups: name of each group, and the labels of each of its images.
        share: of the images, in [0, 1).
        salt: part of the hash, so that a second split of the rest is independent of the first.

    Returns:
        Names of the groups that are held out.
    """

    def place(name: str) -> tuple[list[int], str]:
        labels = frozenset[int]().union(*groups[name])
        return sorted(labels), hashlib.sha256(f"{salt}/{name}".encode()).hexdigest()

    taken, held, images = set[str](), 0, 0
    for name in sorted(groups, key=place):
        size = len(groups[name])
        images += size
        if share > 0 and share * images - held >= size / 2:
            taken.add(name)
            held += size
    return taken
