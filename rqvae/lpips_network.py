"""The network of LPIPS (Zhang et al. 2018), v0.1 of the `lpips` package, for a loss and for a score. A leaf."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import nn

from rqvae.errors import BadInput
from rqvae.weight_files import WeightFile

TRUNK_URLS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}


def lpips_trunk(net: str, trunk_weights: str | None, key: str, remedy: str) -> WeightFile:
    """The file of the trunk's weights, torchvision's own where none is named; see `WeightFile` for the others."""
    url = TRUNK_URLS[net]
    return WeightFile(key, trunk_weights or url, url, remedy)


def load_lpips(net: str, file: WeightFile) -> nn.Module:
    """Frozen network with the package's linear weights and a trunk from a file, on the host, in eval mode.

    Args:
        net: "vgg" or "alex".
        file: state dict of torchvision's `vgg16` or `alexnet` (keys `features.*`; others are ignored).

    Raises:
        BadInput: a missing or unreadable file, one whose sha256 is not that of its name, or other weights.
    """
    trunk = {k: v.float() for k, v in file.read().items() if k.startswith("features.")}
    distance = _build(net)
    places = {key: re.sub(r"^net\.slice\d+", "features", key) for key in distance.state_dict() if "slice" in key}
    for key, place in places.items():
        expected, got = tuple(distance.state_dict()[key].shape), trunk.get(place)
        if got is None or tuple(got.shape) != expected:
            came = "nothing" if got is None else tuple(got.shape)
            raise BadInput(f"{file.key}: {file.path}: {place}: expected {expected}, got {came}")
    distance.load_state_dict({key: trunk[place] for key, place in places.items()}, strict=False, assign=True)
    return distance.requires_grad_(False).eval()


def lpips_outline(net: str) -> nn.Module:
    """The network on `meta`, frozen: to count its operations, for which no weights are needed."""
    return _build(net).to("meta").requires_grad_(False).eval()


def _build(net: str) -> nn.Module:
    """The package's network with its own linear weights and a trunk without memory."""
    # Imported here: it takes a quarter of a second, which runs without LPIPS need not pay.
    import lpips

    # meta: the trunk's constructor would draw 138 M random numbers (vgg, 1.3 s) and move the global generator.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package uses torchvision's deprecated `pretrained`
        distance = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    distance.load_state_dict(torch.load(linear, map_location="cpu", weights_only=True), strict=False, assign=True)
    return distance
