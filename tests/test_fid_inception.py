"""The Inception network and its resizing against pytorch-fid, torch-fidelity, clean-fid, Pillow, and by restatement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import inception as pytorch_fid
from skimage import data
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity
from torch_fidelity import interpolate_compat_tensorflow as tf1

from rqvae.errors import BadInput
from rqvae.metrics.extractors import InceptionExtractor, RandomVGG16, make_extractor
from rqvae.metrics.inception import FIDInception
from rqvae.metrics.resize import resize, resize_matrix
from tests.inception_weights import write_random_inception


def photo(size: int, count: int = 1) -> torch.Tensor:
    """(count, 3, size, size) uint8 crops of a photo."""
    crops = [data.astronaut()[40 * k : 40 * k + size, 100 : 100 + size] for k in range(count)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionExtractor:
    return InceptionExtractor(weights=str(weights)).load()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float(theirs.std()) > 1e-3, "a network that gives a constant shows nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("size", [32, 256, 299, 301])
def test_features_equal_those_of_torch_fidelity(size: int, weights: Path, extractor: InceptionExtractor) -> None:
    theirs = torch_fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    )
    pool, logits = theirs(photo(size))
    ours = extractor(photo(size))
    assert ours.logits is not None
    close(ours.pooled, pool)
    close(ours.logits, logits)


@pytest.mark.parametrize("size", [32, 256, 299, 301])
def test_features_equal_those_of_pytorch_fid(size: int, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pool3 by its wrapper; logits by the network that it loads the file into, whose last layer has the bias, too."""
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    network = pytorch_fid.fid_inception_v3().eval()
    pixels = torch.nn.functional.interpolate(photo(size) / 255, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        pool3 = pytorch_fid.InceptionV3([3]).eval()(photo(size) / 255)[0].flatten(1)
        logits = network(2 * pixels - 1) - network.fc.bias
    ours = InceptionExtractor(weights=str(weights), resize="half_pixel", scaling="unit").load()(photo(size))
    close(ours.pooled, pool3)
    assert ours.logits is not None
    close(ours.logits, logits)


def test_spatial_features_are_a_restatement_in_float64(extractor: InceptionExtractor) -> None:
    """First 7 channels of Mixed_6d.branch1x1 after BN and ReLU, position by position; pool3 and logits likewise."""
    network, seen = extractor.network, {}
    assert network is not None
    handles = [
        network.Mixed_6c.register_forward_hook(lambda *a: seen.update(into_6d=a[2])),
        network.Mixed_7c.register_forward_hook(lambda *a: seen.update(last=a[2])),
    ]
    features = extractor(photo(64, 2))
    for handle in handles:
        handle.remove()
    block = network.Mixed_6d.branch1x1
    x = torch.einsum("bchw,oc->bhwo", seen["into_6d"].double(), block.conv.weight[:7, :, 0, 0].double())
    bn = {k: v[:7].double() for k, v in block.bn.state_dict().items() if v.ndim}
    x = (x - bn["running_mean"]) / (bn["running_var"] + 0.001).sqrt() * bn["weight"] + bn["bias"]
    expected = torch.stack([x[:, h, w, c] for h in range(17) for w in range(17) for c in range(7)], 1).relu()
    assert features.spatial is not None
    assert features.spatial.shape == (2, 2023)
    close(features.spatial.double(), expected)
    pooled = seen["last"].double().mean((2, 3))
    close(features.pooled.double(), pooled)
    assert features.logits is not None
    close(features.logits.double(), pooled @ network.fc.weight.double().T)


@pytest.mark.parametrize("size", [32, 256, 299, 301])
def test_spatial_features_are_those_of_pytorch_fids_network_in_float64(
    size: int, weights: Path, extractor: InceptionExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mixed_6/conv` is its Mixed_6d.branch1x1: 17 x 17 positions with the first 7 channels of each."""
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    network, seen = pytorch_fid.fid_inception_v3().eval().double(), []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.append(a[2]))
    pixels = tf1.interpolate_bilinear_2d_like_tensorflow1x(photo(size).double(), (299, 299), align_corners=False)
    with torch.no_grad():
        network((pixels - 128) / 128)
    spatial = extractor(photo(size)).spatial
    assert spatial is not None
    close(spatial.double(), seen[0].movedim(1, -1)[..., :7].reshape(1, -1))


def test_size_is_that_of_the_published_network() -> None:
    with torch.device("meta"):
        network = FIDInception()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert len(network.state_dict()) == 566


@pytest.mark.parametrize("size", [32, 64, 256, 299, 301, 512])
def test_resizing_equals_what_others_do(size: int) -> None:
    pixels = photo(size)
    expected = torch.nn.functional.interpolate(pixels.float(), (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize(pixels.float(), 299, "half_pixel"), expected, rtol=0, atol=1e-3)
    expected = tf1.interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), (299, 299), align_corners=False)
    torch.testing.assert_close(resize(pixels.float(), 299, "tf1"), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (256, 300), (512, 400)])
def test_bicubic_equals_pillow(height: int, width: int) -> None:
    """Floats channel by channel, clipped, as in clean-fid; and 8-bit images, which Pillow rounds twice."""
    pixels_hwc = np.ascontiguousarray(data.astronaut()[:height, :width])
    levels = torch.from_numpy(pixels_hwc).permute(2, 0, 1)[None].float()
    channels = [Image.fromarray(c.numpy()).resize((299, 299), Image.Resampling.BICUBIC) for c in levels[0]]
    expected = torch.from_numpy(np.stack([np.asarray(c) for c in channels]).clip(0, 255))[None]
    torch.testing.assert_close(resize(levels, 299, "clean"), expected, rtol=0, atol=1e-3)
    expected = np.asarray(Image.fromarray(pixels_hwc).resize((224, 224), Image.Resampling.BICUBIC))
    ours = resize(levels, 224, "pil")[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, expected)


def test_rows_of_a_resize_sum_to_one_and_tf1_shifts() -> None:
    for rule in ("tf1", "half_pixel", "clean"):
        torch.testing.assert_close(resize_matrix(rule, 40, 299).sum(1), torch.ones(299).double())
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    shift = resize(ramp, 299, "tf1")[0, 0, 0, 100:200] - resize(ramp, 299, "half_pixel")[0, 0, 0, 100:200]
    torch.testing.assert_close(shift, torch.full((100,), 0.5 - 0.5 * 32 / 299), rtol=1e-4, atol=0)


def test_random_vgg_is_the_same_everywhere_and_no_fid() -> None:
    state = torch.get_rng_state()
    extractor = make_extractor("random-vgg16").load()
    assert isinstance(extractor, RandomVGG16)
    assert torch.equal(torch.get_rng_state(), state), "building it must not move the global generator"
    features = extractor(photo(64)).pooled
    assert features.shape == (1, 4096)
    assert (features >= 0).all()
    assert features.std() > 1e-4
    assert extractor.name == "fd_random_vgg16"
    assert extractor.identity()["extractor"] == "random-vgg16-fc2-seed0"
    assert extractor.identity()["weights_sha256"].startswith(VGG_SHA256)


VGG_SHA256 = "a3167a1e"


def test_weights_are_checked(weights: Path, tmp_path: Path, extractor: InceptionExtractor) -> None:
    state = torch.load(weights)
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    cases = [(named, state, "expected sha256 6726825d")]
    cases += [
        (tmp_path / "short.pth", {k: v for k, v in state.items() if k != "fc.bias"}, "fc.bias: expected .*nothing")
    ]
    cases += [(tmp_path / "wide.pth", state | {"fc.bias": torch.zeros(1000)}, r"expected \(1008,\), got \(1000,\)")]
    cases += [(tmp_path / "aux.pth", state | {"AuxLogits.fc.bias": torch.zeros(9)}, r"expected nothing, got \(9,\)")]
    for path, content, message in cases:
        torch.save(content, path)
        with pytest.raises(BadInput, match=message):
            InceptionExtractor(weights=str(path)).load()
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(weights.read_bytes()[:1_000_000])
    for path, message in ((truncated, "truncated.pth: expected a state dict"), (tmp_path / "none.pth", "no such file")):
        with pytest.raises(BadInput, match=message) as raised:
            InceptionExtractor(weights=str(path)).load()
        assert "\n" not in str(raised.value)
    assert "mseitzer/pytorch-fid" in str(raised.value)
    with pytest.raises(BadInput, match="expected uint8"):
        extractor(torch.rand(1, 3, 32, 32))
    for name, message in (("inceptoin", "expected inception, "), ("torch.nn.Linear", "subclass")):
        with pytest.raises(BadInput, match=message):
            make_extractor(name)
    with pytest.raises(BadInput, match="unexpected keyword"):
        make_extractor("random-vgg16", resize="tf1")
