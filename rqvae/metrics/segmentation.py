"""Agreement of class maps: the confusion matrix, and the mean intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(found: Tensor, true: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64 counts of pixels, rows the true class, columns the found one.

    Args:
        found: any shape, int64 in [0, K).
        true: the same shape, int64; pixels outside [0, K) (without a label) do not count.
        num_classes: K.
    """
    labelled = (true >= 0) & (true < num_classes)
    pairs = true[labelled] * num_classes + found[labelled]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(confusion_kk: Tensor) -> float:
    """Mean over the classes that occur, true or found, of intersection over union, in [0, 1]; NaN where none does."""
    hits = confusion_kk.diagonal().double()
    union = confusion_kk.sum(0).double() + confusion_kk.sum(1).double() - hits
    return float((hits[union > 0] / union[union > 0]).mean())
