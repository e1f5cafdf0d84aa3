"""The Inception network of FID: the 2015 graph that Heusel et al. 2017 used, with the names of its PyTorch ports.

It is not torchvision's `inception_v3`: 1008 classes, averages that leave the padding out, and a maximum in place of the
average in the pool branch of the last block (an oddity of the 2015 graph that belongs to the definition). Names of
parameters are those of `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

POOL_DIM, SPATIAL_DIM, CLASSES = 2048, 2023, 1008
SPATIAL_CHANNELS = 7
INPUT_SIZE = 299


@dataclass
class InceptionFeatures:
    """What one forward gives.

    Args:
        pool3: (B, 2048) mean of the last block over its 8 x 8 positions: FID, KID, precision and recall.
        spatial: (B, 2023) the first 7 of 192 channels of `mixed_6/conv` after BN and ReLU, at 17 x 17 positions in the
            order (h, w, c): sFID (Nash et al. 2021; openai/guided-diffusion, evaluations/evaluator.py).
        logits: (B, 1008) without the bias, as the original Inception Score has them.
    """

    pool3: Tensor
    spatial: Tensor
    logits: Tensor


class _Conv(nn.Module):
    """Convolution without bias, batch norm of eps 0.001, ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


def _row(channels_in: int, channels: int, width: int) -> _Conv:
    return _Conv(channels_in, channels, (1, width), padding=(0, width // 2))


def _column(channels_in: int, channels: int, height: int) -> _Conv:
    return _Conv(channels_in, channels, (height, 1), padding=(height // 2, 0))


def _mean_3x3(x: Tensor) -> Tensor:
    """Over the pixels that exist: the padding does not count."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    """35 x 35."""

    def __init__(self, channels_in: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels_in, 64)
        self.branch5x5_1, self.branch5x5_2 = _Conv(channels_in, 48), _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(channels_in, 64)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(64, 96, 3, padding=1), _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(channels_in, pool)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean_3x3(x))], 1)


class _BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(channels_in, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(channels_in, 64), _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], 1)


class _BlockC(nn.Module):
    """17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = _Conv(768, channels), _row(channels, channels, 7)
        self.branch7x7_3 = _column(channels, 192, 7)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(768, channels), _column(channels, channels, 7)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _row(channels, channels, 7), _column(channels, channels, 7)
        self.branch7x7dbl_5 = _row(channels, 192, 7)
        self.branch_pool = _Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_3x3(x))], 1)


class _BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(768, 192), _Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(768, 192), _row(192, 192, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = _column(192, 192, 7), _Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, functional.max_pool2d(x, 3, 2)], 1)


class _BlockE(nn.Module):
    """8 x 8; the last of the two has a maximum where all other blocks have a mean."""

    def __init__(self, channels_in: int, *, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1, self.branch3x3_1 = _Conv(channels_in, 320), _Conv(channels_in, 384)
        self.branch3x3_2a, self.branch3x3_2b = _row(384, 384, 3), _column(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(channels_in, 448), _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _row(384, 384, 3), _column(384, 384, 3)
        self.branch_pool = _Conv(channels_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _mean_3x3(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class FIDInception(nn.Module):
    """(B, 3, 299, 299) in about [-1, 1] -> pool3, sFID tensor and logits in one forward; frozen, eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, 2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b, self.Mixed_6c = _BlockC(128), _BlockC(160)
        self.Mixed_6d, self.Mixed_6e = _BlockC(160), _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b, self.Mixed_7c = _BlockE(1280, maximum=False), _BlockE(2048, maximum=True)
        self.fc = nn.Linear(POOL_DIM, CLASSES)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> InceptionFeatures:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, 2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The node `mixed_6/conv` is Mixed_6d.branch1x1 (not 6e), which is what this block's output begins with.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool3 = x.mean((2, 3))
        return InceptionFeatures(pool3, spatial, pool3 @ self.fc.weight.mT)
