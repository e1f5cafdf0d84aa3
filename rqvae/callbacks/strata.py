"""The loss by diffusion time and by class: a mean over all of them hides a part that does not learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rqvae.callbacks.interfaces import LossView, Observer, RunView, UpdateView
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ClassCondition, LabeledImageData, MaskCondition


@dataclass
class LossStrata(Observer):
    """`train/loss_t_bin_I` and `train/loss_class_K` in every row: means over the samples since the last one.

    Sums are kept on the device and read with the row. A group without samples is not in the row. Under a mask a sample
    counts in each class by that class's share of its pixels: the loss of a class is that of the samples it fills.

    Args:
        t_bins: equal parts of the diffusion time, 0 (noise) first; 0 leaves them out.
        classes: the most classes that are told apart; a model of more has none in the row.
    """

    t_bins: int = 4
    classes: int = 20

    def __post_init__(self) -> None:
        if self.t_bins < 0 or self.classes < 0:
            raise BadInput(f"LossStrata: expected t_bins and classes of at least 0, got {self.t_bins}, {self.classes}")

    def after_loss(self, run: RunView, update: UpdateView, micro: LabeledImageData, losses: LossView) -> None:  # noqa: ARG002
        """Add a micro-batch's losses where there is one of each sample."""
        if losses.per_sample is None:
            return
        if losses.t is not None and self.t_bins:
            run.log_groups("loss_t_bin", losses.per_sample, _bins(losses.t, self.t_bins), self.t_bins)
        condition = micro.condition
        if not isinstance(condition, ClassCondition | MaskCondition) or condition.num_classes > self.classes:
            return
        group_b = condition.label if isinstance(condition, ClassCondition) else _shares(condition)
        run.log_groups("loss_class", losses.per_sample, group_b, condition.num_classes)


def _bins(t_b: Tensor, count: int) -> Tensor:
    """(B,) the part of [0, 1] in which each time lies."""
    return (t_b * count).long().clamp(0, count - 1)


def _shares(condition: MaskCondition) -> Tensor:
    """(B, classes) the part of each mask's pixels that a class has; pixels without a label belong to none."""
    classes = range(condition.num_classes)
    return torch.stack([(condition.mask == k).float().mean(dim=(1, 2)) for k in classes], dim=1)
