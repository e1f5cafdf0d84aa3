"""LPIPS (Zhang et al. 2018) as a score of 8-bit images; the network is part of the key, papers mix two of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from rqvae.errors import BadInput
from rqvae.lpips_network import load_lpips, lpips_trunk
from rqvae.metrics.full_precision import full_float32
from rqvae.metrics.reconstruction import to_8bit_levels


class LPIPSScore:
    """Distance of each pair of images, clamped to [0, 1] and rounded to 8 bits as they are stored.

    Args:
        net: "alex", the package's default for scores, or "vgg".
        trunk_weights: torchvision's state dict of the network, a file or a URL whose name ends in -HEX.pth; None is
            torchvision's own URL. There is no score without it: a random trunk would give another number.
    """

    def __init__(self, *, net: Literal["vgg", "alex"] = "alex", trunk_weights: str | None = None) -> None:
        self.key = f"lpips_{net}_v0.1_u8"
        self.net = net
        self.file = lpips_trunk(net, trunk_weights, "lpips.trunk_weights", "or leave the score out")
        self._distance: nn.Module | None = None

    def fetch(self) -> None:
        """Download the weights where they are not on the disk yet."""
        self.file.fetch()

    def load(self, device: torch.device | str = "cpu") -> Self:
        """Read the weights.

        Raises:
            BadInput: a missing or unreadable file, one whose sha256 is not that of its name, or other weights.
        """
        self._distance = load_lpips(self.net, self.file).to(device)
        return self

    @torch.no_grad()
    def __call__(self, recon_bchw: Tensor, images_bchw: Tensor) -> Tensor:
        """Distances, (B,) float32, of two (B, 3, H, W) floats in [0, 1].

        Raises:
            BadInput: shapes that differ or are not (B, 3, H, W).
            RuntimeError: `load` was not called.
        """
        if self._distance is None:
            raise RuntimeError("LPIPSScore: load() must be called first")
        shapes = tuple(recon_bchw.shape), tuple(images_bchw.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][1] != 3:
            raise BadInput(f"lpips: expected two tensors (B, 3, H, W), got {shapes[0]} and {shapes[1]}")
        pair = (to_8bit_levels(x, torch.float32) for x in (recon_bchw, images_bchw))
        with full_float32(recon_bchw.device):
            return self._distance(*pair, normalize=True).flatten()
