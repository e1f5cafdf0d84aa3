"""LPIPS of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", as a loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from typing_extensions import Self

from rqvae.lpips_network import load_lpips, lpips_outline, lpips_trunk
from rqvae.weight_files import WeightFile

OFF = "or switch LPIPS off with lpips: null"


class LPIPSLoss(nn.Module):
    """Distance of two images in the features of a frozen network, v0.1 of the `lpips` package.

    The package ships the calibrated linear weights; the trunk's weights (torchvision's, 528 MB for vgg, 233 MB for
    alex) are a file of the user's. Nothing is read before `load`, and nothing here is ever trained: every tensor is
    frozen and the module stays in eval mode. It belongs to a loss, not to a model: as a child of a trained module it
    would put the trunk into every checkpoint.

    Args:
        net: "vgg", the usual choice for a loss, or "alex", the usual choice for a metric.
        trunk_weights: state dict of torchvision's `vgg16` or `alexnet` (keys `features.*`; others are ignored): a file,
            or a URL whose name ends in -HEX.pth. None is torchvision's own URL. What comes from a URL is kept in
            `torch.hub.get_dir()`/checkpoints. A name that ends in -HEX.pth is checked against the file's sha256, which
            must begin with HEX.
    """

    def __init__(self, *, net: Literal["vgg", "alex"] = "vgg", trunk_weights: str | None = None) -> None:
        super().__init__()
        self.net, self.trunk_weights = net, trunk_weights
        self.distance: nn.Module | None = None

    def fetch(self) -> None:
        """Download the weights where they are not on the disk yet; on one process of a host, before `load`.

        Raises:
            BadInput: the URL cannot be reached, or gives another file than its name says.
        """
        self._file.fetch()

    def load(self) -> Self:
        """Read the weights, on the host; called once, after `fetch`, before the module is moved to a device.

        Raises:
            BadInput: a missing or unreadable file, one whose sha256 is not that of its name, or other weights.
        """
        self.distance = load_lpips(self.net, self._file)
        return self.eval()

    def outline(self) -> Self:
        """Make the network on `meta` in the place of `load`, to count its operations; no weights are needed."""
        self.distance = lpips_outline(self.net)
        return self.eval()

    def forward(self, xs_recon_bchw: Tensor, images_bchw: Tensor) -> Tensor:
        """Mean LPIPS over the batch, a scalar; both (B, 3, H, W) in [0, 1]. The gradient flows to `xs_recon_bchw`.

        The reconstruction is not clamped: outside [0, 1] a clamp would have no gradient.

        Raises:
            RuntimeError: `load` was not called.
        """
        if self.distance is None:
            raise RuntimeError("LPIPSLoss: load() must be called before forward")
        return self.distance(xs_recon_bchw, images_bchw, normalize=True).mean()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stays in eval mode: the package's linear layers have a dropout that a loss must not use."""
        return super().train(False)

    @property
    def _file(self) -> WeightFile:
        return lpips_trunk(self.net, self.trunk_weights, "lpips.trunk_weights", OFF)
