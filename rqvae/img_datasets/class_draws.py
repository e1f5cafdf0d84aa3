"""Which images a shuffled epoch of masks visits, class by class, and which of them come without their condition.

DiffInfinite (Aversa et al. 2023, "DiffInfinite: Large Mask-Image Synthesis via Parallel Random Patch Diffusion in
Histopathology"; `dataset.py` of its code) draws a class first and an image of that class second. One number, `p_cond`,
says how often a draw is for a class; all other draws are unconditional.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.randomness import generator


def cutoffs(p_cond: float, classes: int) -> Tensor:
    """Upper edges of the draws' slots in [0, 1]: slot 0 is unconditional, slot k > 0 belongs to the k-th class.

    The cumulative sum of [1 - p, p/K, ..., p/K]. For p = 0.5 and K = 4 it is 0.5, 0.625, 0.75, 0.875, 1.

    Args:
        p_cond: p, probability of a conditional draw, in [0, 1].
        classes: K, at least 1.

    Returns:
        (K + 1,) float64.

    Raises:
        BadInput: a number out of its range.
    """
    if not 0 <= p_cond <= 1:
        raise BadInput(f"p_cond: expected a number in [0, 1], got {p_cond}")
    if classes < 1:
        raise BadInput(f"classes: expected at least 1 to draw from, got {classes}")
    shares = torch.tensor([1 - p_cond] + [p_cond / classes] * classes, dtype=torch.float64)
    return shares.cumsum(0)


@dataclass(frozen=True)
class ClassDraws:
    """Draws with replacement, as many as there are images.

    A class's slot draws uniformly from the images that contain it. The unconditional slot draws uniformly from the
    unlabelled images and those with the unknown class (all images where no class is unknown), without their masks.

    Args:
        present_nk: (N, K) bool, which classes each image contains; all False for an unlabelled one.
        p_cond: probability of a draw with its mask.
        unknown_class: the class without a slot of its own; None where each class has one.
        names: of the classes, for errors; empty takes their numbers.

    Raises:
        BadInput: a probability out of its range, a class without images, nothing for the unconditional draws,
            unlabelled images that no draw would reach.
    """

    present_nk: Tensor
    p_cond: float
    unknown_class: int | None = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cutoffs(self.p_cond, len(self.classes))
        for k in self.classes:
            if self.p_cond > 0 and not self.present_nk[:, k].any():
                name = self.names[k] if self.names else k
                raise BadInput(f"class {name}: expected at least one image of the train split to draw, got none")
        if self.p_cond < 1 and not len(self.unconditional):
            raise BadInput(f"p_cond: expected 1, as no image is there for unconditional draws, got {self.p_cond:g}")
        unlabelled = int((~self.present_nk.any(1)).sum())
        if self.p_cond == 1 and unlabelled:
            raise BadInput(f"p_cond: expected less than 1, as {unlabelled} unlabelled images are never drawn, got 1")

    @property
    def classes(self) -> list[int]:
        """Classes with a slot, in the slots' order."""
        return [k for k in range(self.present_nk.shape[1]) if k != self.unknown_class]

    @property
    def unconditional(self) -> Tensor:
        """Indices of the images of slot 0."""
        if self.unknown_class is None:
            return torch.arange(len(self.present_nk))
        return (self.present_nk[:, self.unknown_class] | ~self.present_nk.any(1)).nonzero().flatten()

    def draw(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The draws of an epoch, a function of (seed, epoch).

        Returns:
            (N,) int64 slots and (N,) int64 indices of images.
        """
        host = generator(seed, "class draws", epoch)
        place_n, member_n = torch.rand(2, len(self.present_nk), generator=host, dtype=torch.float64)
        edges = cutoffs(self.p_cond, len(self.classes))
        slot_n = torch.bucketize(place_n, edges, right=True).clamp(max=len(edges) - 1)
        pools = [self.unconditional, *(self.present_nk[:, k].nonzero().flatten() for k in self.classes)]
        index_n = torch.empty_like(slot_n)
        for slot, pool in enumerate(pools):
            chosen = slot_n == slot
            index_n[chosen] = pool[(member_n[chosen] * len(pool)).long()]
        return slot_n, index_n
