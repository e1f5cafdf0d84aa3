"""LPIPS of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", as a loss."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from rqvae.errors import BadInput

TRUNK_URLS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
_HASHED = re.compile(r"-([0-9a-f]{8,64})\.pth$")
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
        if self._path().is_file() or self._url() is None:
            return
        url, path = str(self._url()), self._path()
        stated = _HASHED.search(path.name)
        if stated is None:
            raise BadInput(f"lpips.trunk_weights: {url}: expected a name that ends in -SHA256.pth")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=stated[1])
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            reason = str(error).partition("\n")[0]
            raise BadInput(
                f"lpips.trunk_weights: {path}: no such file, and {url} cannot be had ({reason}); place it there, {OFF}"
            ) from error

    def load(self) -> Self:
        """Read the weights, on the host; called once, after `fetch`, before the module is moved to a device.

        Raises:
            BadInput: a missing or unreadable file, one whose sha256 is not that of its name, or other weights.
        """
        trunk = _read_trunk(self.net, self._path())
        distance = _build(self.net)
        places = {key: re.sub(r"^net\.slice\d+", "features", key) for key in distance.state_dict() if "slice" in key}
        for key, place in places.items():
            expected, got = tuple(distance.state_dict()[key].shape), trunk.get(place)
            if got is None or tuple(got.shape) != expected:
                came = "nothing" if got is None else tuple(got.shape)
                raise BadInput(f"lpips.trunk_weights: {self._path()}: {place}: expected {expected}, got {came}")
        distance.load_state_dict({key: trunk[place] for key, place in places.items()}, strict=False, assign=True)
        self.distance = distance.requires_grad_(False)
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

    def _url(self) -> str | None:
        source = self.trunk_weights or TRUNK_URLS[self.net]
        return source if source.startswith(("http://", "https://")) else None

    def _path(self) -> Path:
        url = self._url()
        if url is None:
            return Path(str(self.trunk_weights))
        return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])


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


def _read_trunk(net: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadInput(f"lpips.trunk_weights: {path}: no such file; download {TRUNK_URLS[net]} to it, {OFF}")
    stated = _HASHED.search(path.name)
    if stated and not (digest := _sha256(path)).startswith(stated[1]):
        raise BadInput(
            f"lpips.trunk_weights: {path}: expected sha256 {stated[1]}..., got {digest[:16]}...; "
            f"download {TRUNK_URLS[net]} again, {OFF}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"lpips.trunk_weights: {path}: expected a state dict of tensors: {reason}") from error
    if not isinstance(state, dict):
        raise BadInput(f"lpips.trunk_weights: {path}: expected a state dict of tensors, got {type(state).__name__}")
    return {k: v.float() for k, v in state.items() if isinstance(v, Tensor) and k.startswith("features.")}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
