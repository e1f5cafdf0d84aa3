"""The patch discriminator of Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks"."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812  (the name of torch's own documentation)
from torch import Tensor, nn

from rqvae.errors import BadInput

LEAK = 0.2
INIT_STD = 0.02
NORM_GROUPS = 8


class PatchGAN(nn.Module):
    """4x4 convolutions that judge overlapping patches: `layers` of stride 2, then two of stride 1.

    The logits have sides `H // 2^layers - 2`. Channels double from `width` up to 8 * `width`; leaky ReLU of slope 0.2;
    weights start from N(0, 0.02), as in the paper.

    GroupNorm stands where the paper has BatchNorm. Statistics over the batch would make an image's logits depend on
    its neighbours, so on how a batch is split over processes and micro-batches, and would differ between the real and
    the fake batch.

    Args:
        width: channels after the first convolution; a multiple of 4 with `norm: group`.
        layers: convolutions of stride 2; 3 is the paper's 70x70 patch, 1 or 2 suit images of 32 px.
        norm: "group" (8 groups) or "none", after every convolution but the first and the last.

    Raises:
        BadInput: `layers` below 1, or a `width` that the groups do not divide.
    """

    def __init__(self, *, width: int = 64, layers: int = 3, norm: Literal["group", "none"] = "group") -> None:
        super().__init__()
        if layers < 1:
            raise BadInput(f"PatchGAN.layers: expected at least 1, got {layers}")
        if width < 1 or (norm == "group" and 2 * width % NORM_GROUPS):
            raise BadInput(f"PatchGAN.width: expected a positive multiple of {NORM_GROUPS // 2}, got {width}")
        self.layers = layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        self.convs = nn.ModuleList([nn.Conv2d(3, width, 4, stride=2, padding=1)])
        self.norms = nn.ModuleList([nn.Identity()])
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i + 1 < layers else 1
            self.convs.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=norm == "none"))
            self.norms.append(nn.GroupNorm(NORM_GROUPS, after) if norm == "group" else nn.Identity())
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.apply(_init)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [0, 1]; large means real.

        Raises:
            BadInput: images too small to leave a logit.
        """
        smallest = 3 * 2**self.layers
        if min(images_bchw.shape[2:]) < smallest:
            size = "x".join(str(side) for side in images_bchw.shape[2:])
            raise BadInput(f"PatchGAN: expected images of at least {smallest} px with {self.layers} layers, got {size}")
        h_bchw = 2 * images_bchw - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h_bchw = F.leaky_relu(norm(conv(h_bchw)), LEAK)
        return self.head(h_bchw)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
