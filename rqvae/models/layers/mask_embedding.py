"""Segmentation masks as conditions: where each class is, and how much of it there is.

Shapes: B batch, H W image height and width, h w latent height and width, K classes. Number K marks a pixel without a
label, so that the null condition has a channel, and a vector, of its own: it is neither zero nor one of the classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the name everyone knows)
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import Condition, DataSpec, LatentShape, MaskCondition


def soft_one_hot(mask_bhw: Tensor, num_classes: int, sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The share of each class in the pixels of each latent position: the one-hot mask, averaged over areas.

    Args:
        mask_bhw: (B, H, W) int64 in [0, K].
        num_classes: K.
        sides: (h, w), which divide (H, W).
        dtype: of the result.

    Returns:
        (B, K + 1, h, w) in [0, 1]; sums to 1 over the channels.

    Raises:
        BadInput: sides that do not divide the mask's.
    """
    height, width = mask_bhw.shape[1:]
    if height % sides[0] or width % sides[1]:
        raise BadInput(
            f"condition.mask: expected sides divisible by the latent's {sides[0]} x {sides[1]}, got {height} x {width}"
        )
    ids_k = torch.arange(num_classes + 1, device=mask_bhw.device)
    one_hot = (mask_bhw[:, None] == ids_k[:, None, None]).to(dtype)
    return F.avg_pool2d(one_hot, (height // sides[0], width // sides[1]))


def class_distribution(mask_bhw: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(B, K + 1): the share of each class in the whole mask (B, H, W), at last that of pixels without a label."""
    ids_k = torch.arange(num_classes + 1, device=mask_bhw.device)
    return (mask_bhw[:, None] == ids_k[:, None, None]).to(dtype).mean((2, 3))


def checked_mask(condition: Condition | None, num_classes: int) -> Tensor:
    """The mask (B, H, W) of a condition.

    Raises:
        BadInput: another kind of condition, or another number of classes.
    """
    if not isinstance(condition, MaskCondition) or condition.num_classes != num_classes:
        kind = type(condition).__name__
        got = f"{kind} of {condition.num_classes} classes" if isinstance(condition, MaskCondition) else kind
        raise BadInput(f"condition: expected MaskCondition of {num_classes} classes, got {got}")
    return condition.mask


class MaskLayout(nn.Module):
    """Where each class is: (B, K + 1, h, w) `soft_one_hot` channels at the latent's resolution.

    Args:
        data_spec: gives K and the mask's sides.
        latent_shape: (C, h, w).

    Raises:
        BadInput: a latent whose sides do not divide the image's.
    """

    def __init__(self, data_spec: DataSpec, latent_shape: LatentShape) -> None:
        super().__init__()
        (_, height, width), sides = data_spec.image_shape, (latent_shape[1], latent_shape[2])
        if height % sides[0] or width % sides[1]:
            raise BadInput(f"stage2: expected a latent whose sides divide {height} x {width} for masks, got {sides}")
        self.num_classes, self.sides, self.channels = data_spec.num_mask_classes, sides, data_spec.num_mask_classes + 1

    def forward(self, condition: Condition | None, like: Tensor) -> Tensor:
        """(B, K + 1, h, w) of a `MaskCondition`, in the type of `like`.

        Raises:
            BadInput: another kind of condition.
        """
        return soft_one_hot(checked_mask(condition, self.num_classes), self.num_classes, self.sides, like.dtype)


class MaskDistributionEmbedding(nn.Module):
    """How much of each class there is: the vectors of the classes, weighted by their shares of the mask.

    The class vectors of DiffInfinite's descendants ((B, K) shares times a (K, width) table), with a vector of its own
    for pixels without a label: the null condition is that vector alone.

    Args:
        num_classes: K.
        width: of the vectors.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, condition: Condition | None) -> Tensor:
        """(B, width) of a `MaskCondition`.

        Raises:
            BadInput: another kind of condition.
        """
        mask_bhw = checked_mask(condition, self.num_classes)
        return class_distribution(mask_bhw, self.num_classes, self.table.weight.dtype) @ self.table.weight


class LegacyMaskEmbedding(nn.Module):
    """The original's class vector: shares times a (K, inner) table, then Linear, GELU, Linear: (B, width).

    A pixel without a label counts as class 0, which is what the original knows as the null condition.

    Args:
        num_classes: K.
        inner: width of the table.
        width: of the result.
    """

    def __init__(self, num_classes: int, inner: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes, inner)
        self.mlp = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, condition: Condition | None) -> Tensor:
        """(B, width) of a `MaskCondition`.

        Raises:
            BadInput: another kind of condition.
        """
        mask_bhw = checked_mask(condition, self.num_classes)
        shares_bk = class_distribution(mask_bhw, self.num_classes, self.table.weight.dtype)
        known_bk = torch.cat((shares_bk[:, :1] + shares_bk[:, -1:], shares_bk[:, 1:-1]), dim=1)
        return self.mlp(known_bk @ self.table.weight)
