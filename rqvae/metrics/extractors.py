"""Networks whose features are compared: uint8 images in, features out, and what a result says of them."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from rqvae.errors import BadInput
from rqvae.metrics.full_precision import full_float32
from rqvae.metrics.inception import INPUT_SIZE, POOL_DIM, FIDInception
from rqvae.metrics.resize import Resize, resize
from rqvae.randomness import kept
from rqvae.weight_files import WeightFile

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Features:
    """What an extractor gives for a batch.

    Args:
        pooled: (B, D) for Fréchet and kernel distances, precision and recall.
        spatial: (B, D') for sFID, where the network has it.
        logits: (B, classes) for the Inception Score, where the network has them.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(nn.Module, ABC):
    """A frozen network; any subclass can be named by class_path. `fetch`, `load`, then calls with uint8 images."""

    name: ClassVar[str]
    """What the distance of its features is called in results: "fid", "fd_dinov2"."""
    dim: ClassVar[int]
    """D, features of an image."""

    def fetch(self) -> None:
        """Download weights that are not on the disk yet; on one process of a host, before `load`."""

    @abstractmethod
    def load(self) -> Self:
        """Read the weights, on the host."""

    @abstractmethod
    def forward(self, images_bchw_u8: Tensor) -> Features:
        """(B, 3, H, W) uint8 -> float32 features on the same device."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What two results must share to be compared: extractor, weights, resize, scaling."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stays in eval mode."""
        return super().train(False)


class InceptionExtractor(Extractor):
    """The network of FID, sFID and the Inception Score.

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth` as a file, or a URL whose name ends in -HEX.pth. None is the URL
            of pytorch-fid's release; it is kept in `torch.hub.get_dir()`/checkpoints.
        resize: rule that makes 299 x 299 pixels. "tf1" is the graph's own, with which published numbers were computed.
        scaling: "tf" is the graph's own (x - 128) / 128; "unit" is pytorch-fid's 2 x / 255 - 1.
    """

    name = "fid"
    dim = POOL_DIM

    def __init__(
        self, *, weights: str | None = None, resize: Resize = "tf1", scaling: Literal["tf", "unit"] = "tf"
    ) -> None:
        super().__init__()
        for key, value, allowed in (("resize", resize, get_args(Resize)), ("scaling", scaling, ("tf", "unit"))):
            if value not in allowed:
                raise BadInput(f"inception.{key}: expected one of {', '.join(allowed)}, got {value}")
        self.resize, self.scaling = resize, scaling
        remedy = "or choose the extractor random-vgg16, whose scores are no FID"
        self.file = WeightFile("inception.weights", weights or INCEPTION_URL, INCEPTION_URL, remedy)
        self.network: FIDInception | None = None
        self.weights_sha256 = ""

    def fetch(self) -> None:
        self.file.fetch()

    def load(self) -> Self:
        """See `Extractor.load`.

        Raises:
            BadInput: a missing or truncated file, one whose sha256 is not that of its name, or other weights.
        """
        state = {k: v.float() if v.is_floating_point() else v for k, v in self.file.read().items()}
        with torch.device("meta"):
            network = FIDInception()
        # Counters of training steps: the published file has none, and eval mode reads none.
        own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
        given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        _check_shapes(self.file, own, given)
        network.load_state_dict(given, strict=False, assign=True)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        # channels_last: 2.9 images/s against 2.2 on two CPU cores.
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights_sha256 = tensors_sha256(given)
        return self.eval()

    @torch.no_grad()
    def forward(self, images_bchw_u8: Tensor) -> Features:
        """See `Extractor.forward`.

        Raises:
            BadInput: images that are not uint8 (B, 3, H, W).
            RuntimeError: `load` was not called.
        """
        if self.network is None:
            raise RuntimeError("InceptionExtractor: load() must be called before forward")
        check_images(images_bchw_u8)
        with full_float32(images_bchw_u8.device):
            levels = resize(images_bchw_u8.float(), INPUT_SIZE, self.resize)
            scaled = (levels - 128) / 128 if self.scaling == "tf" else levels / 127.5 - 1
            out = self.network(scaled.contiguous(memory_format=torch.channels_last))
        return Features(out.pool3, out.spatial, out.logits)

    def identity(self) -> dict[str, str]:
        return {
            "extractor": "inception-2015-12-05",
            "weights_sha256": self.weights_sha256,
            "resize": self.resize,
            "scaling": self.scaling,
        }


class RandomVGG16(Extractor):
    """VGG16 with random weights, which needs no download (Naeem et al. 2020 show that it ranks models, too).

    torchvision's initialisation (convolutions Kaiming normal by fan out, linear layers N(0, 0.01), no biases) from a
    fixed seed, images bilinear to 224 x 224 with half-pixel centres, second linear layer after ReLU, 4096 features.
    Its scores are comparable among themselves and are no FID.

    Args:
        seed: of the weights.
    """

    name = "fd_random_vgg16"
    dim = 4096

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.network: nn.Module | None = None
        self.weights_sha256 = ""

    def load(self) -> Self:
        # Imported here: half a second that other extractors need not pay.
        from torchvision.models import vgg16

        with kept():
            torch.manual_seed(self.seed)
            network = vgg16(weights=None)
        network.classifier = network.classifier[:5]  # up to fc2 and its ReLU; dropout is off in eval mode
        self.network = network.requires_grad_(False)
        self.weights_sha256 = tensors_sha256(network.state_dict())
        return self.eval()

    @torch.no_grad()
    def forward(self, images_bchw_u8: Tensor) -> Features:
        """See `InceptionExtractor.forward`."""
        if self.network is None:
            raise RuntimeError("RandomVGG16: load() must be called before forward")
        check_images(images_bchw_u8)
        with full_float32(images_bchw_u8.device):
            levels = resize(images_bchw_u8.float(), 224, "half_pixel")
            return Features(self.network(_imagenet_normalised(levels)))

    def identity(self) -> dict[str, str]:
        return {
            "extractor": f"random-vgg16-fc2-seed{self.seed}",
            "weights_sha256": self.weights_sha256,
            "resize": "half_pixel",
            "scaling": "imagenet",
        }


class DINOv2(Extractor):
    """DINOv2 ViT-L/14 (Oquab et al. 2023) for FD-DINOv2 (Stein et al. 2023): 1024 features of a 224 x 224 image.

    Images are squashed to 224 x 224 by PIL's bicubic rule on 8 bits (layer6ai-labs/dgm-eval, dinov2.py).

    Args:
        repository: a local clone of facebookresearch/dinov2, whose code is run: none is downloaded.
        weights: `dinov2_vitl14_pretrain.pth`, a file, or a URL whose name ends in -HEX.pth.
        model: entry point of the repository's hubconf.py with 1024 features.
    """

    name = "fd_dinov2"
    dim = 1024

    def __init__(self, *, repository: str, weights: str, model: str = "dinov2_vitl14") -> None:
        super().__init__()
        published = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
        self.repository, self.model = repository, model
        self.file = WeightFile("dinov2.weights", weights, published, "or choose another extractor")
        self.network: nn.Module | None = None
        self.weights_sha256 = ""

    def fetch(self) -> None:
        self.file.fetch()

    def load(self) -> Self:
        """See `Extractor.load`.

        Raises:
            BadInput: no such repository, or weights that are missing or others.
        """
        state = self.file.read()
        try:
            network = torch.hub.load(self.repository, self.model, source="local", pretrained=False)
        except (OSError, RuntimeError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise BadInput(
                f"dinov2.repository: {self.repository}: expected a clone of facebookresearch/dinov2: {reason}"
            ) from error
        _check_shapes(self.file, network.state_dict(), state)
        network.load_state_dict(state)
        self.network = network.requires_grad_(False)
        self.weights_sha256 = tensors_sha256(state)
        return self.eval()

    @torch.no_grad()
    def forward(self, images_bchw_u8: Tensor) -> Features:
        """See `InceptionExtractor.forward`."""
        if self.network is None:
            raise RuntimeError("DINOv2: load() must be called before forward")
        check_images(images_bchw_u8)
        with full_float32(images_bchw_u8.device):
            return Features(self.network(_imagenet_normalised(resize(images_bchw_u8.float(), 224, "pil"))))

    def identity(self) -> dict[str, str]:
        return {
            "extractor": self.model,
            "weights_sha256": self.weights_sha256,
            "resize": "pil",
            "scaling": "imagenet",
        }


def make_extractor(name: str, **arguments: Any) -> Extractor:
    """An extractor by its short name or class path, not loaded yet.

    Args:
        name: inception, random-vgg16, dinov2, or package.module.Class of a subclass of `Extractor`.
        arguments: of its constructor.

    Raises:
        BadInput: no such class, or arguments that it has not.
    """
    short = {"inception": InceptionExtractor, "random-vgg16": RandomVGG16, "dinov2": DINOv2}
    kind: Any = short.get(name)
    if kind is None:
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise BadInput(f"extractor: expected {', '.join(short)} or a class path, got {name} ({error})") from error
        if not (isinstance(kind, type) and issubclass(kind, Extractor)):
            raise BadInput(f"extractor: {name}: expected a subclass of rqvae.metrics.extractors.Extractor")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise BadInput(f"extractor: {name}: {error}") from error


def check_images(images_bchw_u8: Tensor) -> None:
    """Images as extractors take them.

    Raises:
        BadInput: not uint8 (B, 3, H, W).
    """
    shape = tuple(images_bchw_u8.shape)
    if images_bchw_u8.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise BadInput(f"images: expected uint8 (B, 3, H, W), got {images_bchw_u8.dtype} {shape}")


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hex digest of names and values, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _imagenet_normalised(levels_bchw: Tensor) -> Tensor:
    mean, std = (levels_bchw.new_tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (levels_bchw / 255 - mean) / std


def _check_shapes(file: WeightFile, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for key in [*own, *given]:
        expected = tuple(own[key].shape) if key in own else "nothing"
        got = tuple(given[key].shape) if key in given else "nothing"
        if expected != got:
            raise BadInput(f"{file.key}: {file.path}: {key}: expected {expected}, got {got}")
