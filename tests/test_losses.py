"""Losses against closed forms, torch's own functions, the lpips package, and one process that holds the whole batch."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import lpips
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.losses.adaptive import Mean, last_layer_weight, reconstruction_weight
from rqvae.models.losses.gan import GANKind, discriminator_loss, generator_loss
from rqvae.models.losses.lpips import LPIPSLoss
from rqvae.models.losses.patchgan import PatchGAN
from rqvae.models.losses.recon import recon_loss

# ---- reconstruction ----


def test_recon_losses_equal_torchs_and_refuse_to_broadcast() -> None:
    images, xs_recon = torch.rand(2, 4, 3, 8, 12, dtype=torch.float64)
    assert torch.equal(recon_loss("l1", xs_recon, images), F.l1_loss(xs_recon, images))
    assert torch.equal(recon_loss("l2", xs_recon, images), F.mse_loss(xs_recon, images))
    with pytest.raises(ValueError, match=r"expected the images' shape \(4, 3, 8, 12\), got \(4, 1, 8, 12\)"):
        recon_loss("l1", xs_recon[:, :1], images)


# ---- GAN ----

LOGITS_REAL = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
LOGITS_FAKE = torch.tensor([-3.0, -0.25, 2.0], dtype=torch.float64)


def test_hinge_losses_by_hand() -> None:
    expected = 0.5 * ((3 + 0.5 + 0) / 3 + (0 + 0.75 + 3) / 3)
    assert discriminator_loss("hinge", LOGITS_REAL, LOGITS_FAKE).item() == pytest.approx(expected, rel=1e-12)
    assert generator_loss("hinge", LOGITS_FAKE).item() == pytest.approx(1.25 / 3, rel=1e-12)


def test_non_saturating_losses_are_cross_entropies() -> None:
    bce = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones_like(LOGITS_REAL), torch.zeros_like(LOGITS_REAL)
    expected = (bce(LOGITS_REAL, ones) + bce(LOGITS_FAKE, zeros)) / 2
    torch.testing.assert_close(discriminator_loss("non_saturating", LOGITS_REAL, LOGITS_FAKE), expected)
    torch.testing.assert_close(generator_loss("non_saturating", LOGITS_FAKE), bce(LOGITS_FAKE, ones))


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_descent_moves_the_logits_the_right_way(kind: GANKind) -> None:
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    discriminator_loss(kind, real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    (slope,) = torch.autograd.grad(generator_loss(kind, fake), fake)
    assert (slope < 0).all()


# ---- PatchGAN ----


@pytest.mark.parametrize(
    ("layers", "size", "logits"), [(1, (32, 32), (14, 14)), (2, (32, 48), (6, 10)), (3, (256, 256), (30, 30))]
)
def test_patchgan_logits(layers: int, size: tuple[int, int], logits: tuple[int, int]) -> None:
    assert PatchGAN(width=8, layers=layers)(torch.rand(1, 3, *size)).shape == (1, 1, *logits)


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_patchgan_receptive_field_is_the_papers(layers: int, field: int) -> None:
    # Without norms, whose statistics see the whole image. 70 px for three layers: Isola et al. 2017, section 3.2.
    images = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    logits = PatchGAN(width=4, layers=layers, norm="none").double()(images)
    middle = logits.shape[-1] // 2
    (slope,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    columns = slope.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert columns[-1] - columns[0] + 1 == field


def test_patchgan_has_no_statistics_over_the_batch_and_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    net = PatchGAN(width=32, layers=2).double()
    assert not list(net.buffers())
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(images)[2:3], net(images[2:3]), rtol=1e-9, atol=1e-12)
    weight = net.convs[1].weight
    assert isinstance(weight, Tensor)
    assert abs(weight.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * weight.numel())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in _after_backward(net, images))


def _after_backward(net: nn.Module, images: Tensor) -> list[nn.Parameter]:
    net(images).square().sum().backward()
    return list(net.parameters())


def test_patchgan_refuses_what_cannot_work() -> None:
    with pytest.raises(BadInput, match=r"expected images of at least 24 px with 3 layers, got 16x32"):
        PatchGAN(width=4)(torch.rand(1, 3, 16, 32))
    assert PatchGAN(width=4)(torch.rand(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(BadInput, match=r"PatchGAN\.width: expected a positive multiple of 4, got 6"):
        PatchGAN(width=6)
    assert PatchGAN(width=6, norm="none")(torch.rand(1, 3, 32, 32)).shape == (1, 1, 2, 2)
    with pytest.raises(BadInput, match=r"PatchGAN\.layers: expected at least 1, got 0"):
        PatchGAN(layers=0)


# ---- adaptive weight ----


def identity(x: Tensor) -> Tensor:
    return x


class Ranks:
    """`mean` of several processes played one after the other: the first round records, the second answers."""

    def __init__(self, losses: list[Callable[[], tuple[Tensor, ...]]], weight: Callable[..., Tensor]) -> None:
        sent: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            sent.append(x)
            return x

        for local in losses:
            weight(*local(), record)
        assert len(sent) == len(losses), "one collective per weight"
        answer: Mean = lambda _: torch.stack(sent).mean(0)  # noqa: E731
        self.weights = [weight(*local(), answer) for local in losses]


def toy() -> tuple[nn.Module, nn.Conv2d, nn.Module, Tensor]:
    torch.manual_seed(0)
    body, last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
    judge = PatchGAN(width=4, layers=1)
    return body.double(), last.double(), judge.double(), torch.rand(6, 3, 8, 12, dtype=torch.float64)


def toy_losses(images: Tensor) -> tuple[Tensor, Tensor, Tensor, nn.Conv2d]:
    """Reconstruction and GAN loss, the reconstruction, and the last layer."""
    body, last, judge, _ = toy()
    xs_recon = last(F.silu(body(images)))
    return recon_loss("l1", xs_recon, images), generator_loss("hinge", judge(xs_recon)), xs_recon, last


def split(ranks: int) -> list[Tensor]:
    return list(toy()[3].chunk(ranks))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_last_layer_weight_is_that_of_the_whole_batch(ranks: int) -> None:
    recon, gan, _, last = toy_losses(toy()[3])
    norms = [torch.autograd.grad(x, last.weight, retain_graph=True)[0].norm() for x in (recon, gan)]

    def local(images: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        def losses() -> tuple[Tensor, ...]:
            recon, gan, _, last = toy_losses(images)
            return recon, gan, last.weight

        return losses

    weights = Ranks([local(x) for x in split(ranks)], last_layer_weight).weights
    for weight in weights:
        torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4), rtol=1e-12, atol=0)
        assert not weight.requires_grad
    assert all(torch.equal(w, weights[0]) for w in weights)


def test_ratio_of_local_norms_would_be_another_number() -> None:
    # If local weights averaged to the same, the test above would show nothing.
    whole = toy_losses(toy()[3])
    halves = [toy_losses(x) for x in split(2)]
    weight, *local = [
        last_layer_weight(recon, gan, last.get_parameter("weight"), identity)
        for recon, gan, _, last in (whole, *halves)
    ]
    assert abs(torch.stack(local).mean() / weight - 1) > 1e-4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_reconstruction_weight_is_that_of_the_whole_batch(ranks: int) -> None:
    recon, gan, xs_recon, _ = toy_losses(toy()[3])
    norms = [torch.autograd.grad(x, xs_recon, retain_graph=True)[0].norm() for x in (recon, gan)]
    scale = math.sqrt(xs_recon.numel())
    weights = Ranks([lambda x=x: toy_losses(x)[:3] for x in split(ranks)], reconstruction_weight).weights  # type: ignore[misc]
    for weight in weights:
        torch.testing.assert_close(weight, norms[0] * scale / (norms[1] * scale + 1e-4), rtol=1e-12, atol=0)
        assert not weight.requires_grad


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (16, 3, 32, 48)])
def test_reconstruction_weight_in_closed_form_at_any_size(shape: tuple[int, ...]) -> None:
    # L1 has slope 1/N everywhere, a mean of c x has c/N: the ratio is 1/c, whatever N.
    xs_recon = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    losses = (xs_recon + 1).abs().mean(), (8 * xs_recon).mean()
    weight = reconstruction_weight(*losses, xs_recon, identity)
    assert weight.item() == pytest.approx(1 / (8 + 1e-4), rel=1e-12)


def test_weights_are_finite_at_vanishing_gradients_and_the_graph_survives() -> None:
    last = nn.Parameter(torch.ones(3))
    xs_recon = 2 * last
    recon, none = xs_recon.sum(), (0 * xs_recon).sum()
    assert last_layer_weight(recon, none, last, identity).item() == 1e4
    assert reconstruction_weight(none, none, xs_recon, identity).item() == 0
    assert last.grad is None
    (recon + none).backward()
    torch.testing.assert_close(last.grad, torch.full((3,), 2.0))


# ---- LPIPS ----

Net = Literal["vgg", "alex"]


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random trunks in torchvision's layout: features, and a classifier that must be ignored."""
    torch.manual_seed(0)
    with torch.device("meta"):
        nets = {"vgg": torchvision.models.vgg16(weights=None), "alex": torchvision.models.alexnet(weights=None)}
    paths = {}
    for name, net in nets.items():
        shapes = {f"features.{k}": v.shape for k, v in net.features.state_dict().items()}
        fan_in = {k: s[1:].numel() if len(s) > 1 else 100 for k, s in shapes.items()}
        state = {k: torch.randn(s) * math.sqrt(2 / fan_in[k]) for k, s in shapes.items()}
        paths[name] = tmp_path_factory.mktemp("trunks") / f"{name}.pth"
        torch.save(state | {"classifier.0.weight": torch.zeros(1)}, paths[name])
    return paths


def lpips_package(net: Net, trunk: Path) -> nn.Module:
    """The package itself with the same trunk, its convolutions filled in their order."""
    reference = lpips.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False)
    values = [v for k, v in torch.load(trunk).items() if k.startswith("features.")]
    ours = list(reference.net.parameters())
    assert len(values) == len(ours)
    for parameter, value in zip(ours, values, strict=True):
        parameter.data.copy_(value)
    return reference


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_the_package(net: Net, trunks: dict[str, Path]) -> None:
    xs_recon, images = torch.rand(2, 3, 3, 32, 48)
    state = torch.get_rng_state()
    loss = LPIPSLoss(net=net, trunk_weights=str(trunks[net])).load()
    assert torch.equal(torch.get_rng_state(), state), "building it must not move the global generator"
    expected = lpips_package(net, trunks[net])(2 * xs_recon - 1, 2 * images - 1).mean()
    assert expected > 1e-3
    torch.testing.assert_close(loss(xs_recon, images), expected, rtol=1e-6, atol=0)
    assert loss(images, images).item() == 0


def test_lpips_has_a_gradient_for_the_reconstruction_and_none_for_itself(trunks: dict[str, Path]) -> None:
    loss = LPIPSLoss(net="alex", trunk_weights=str(trunks["alex"])).load().double()
    loss.train()
    assert not any(m.training for m in loss.modules())
    assert not any(p.requires_grad for p in loss.parameters())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    xs_recon = torch.rand_like(images).requires_grad_()
    value = loss(xs_recon, images)
    assert torch.equal(value, loss(xs_recon, images)), "dropout is on"
    value.backward()
    assert xs_recon.grad is not None
    step = 1e-7 * torch.randn_like(images)
    change = loss(xs_recon.detach() + step, images) - loss(xs_recon.detach() - step, images)
    torch.testing.assert_close(change, 2 * (xs_recon.grad * step).sum(), rtol=1e-4, atol=0)
    assert change.abs() > 0


def test_lpips_touches_no_disk_before_load_and_names_the_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    loss = LPIPSLoss()
    with pytest.raises(RuntimeError, match="load"):
        loss(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    with pytest.raises(BadInput) as raised:
        loss.load()
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        str(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "lpips: null",
    ):
        assert part in message


def bad_trunks(folder: Path, good: Path) -> dict[str, tuple[Any, str]]:
    state = torch.load(good)
    return {
        "alexnet-00000000.pth": (state, r"expected sha256 00000000\.\.\., got"),
        "short.pth": ({"features.0.weight": state["features.0.weight"]}, "features.0.bias: expected .*, got nothing"),
        "wide.pth": (state | {"features.3.bias": torch.zeros(7)}, r"features.3.bias: expected \(192,\), got \(7,\)"),
        "list.pth": ([torch.zeros(1)], "expected a state dict of tensors, got list"),
        "text.pth": (None, "expected a state dict of tensors: "),
    }


@pytest.mark.parametrize("name", ["alexnet-00000000.pth", "short.pth", "wide.pth", "list.pth", "text.pth"])
def test_lpips_refuses_other_weights_in_one_line(name: str, tmp_path: Path, trunks: dict[str, Path]) -> None:
    content, message = bad_trunks(tmp_path, trunks["alex"])[name]
    path = tmp_path / name
    if content is None:
        path.write_text("not weights")
    else:
        torch.save(content, path)
    with pytest.raises(BadInput, match=message) as raised:
        LPIPSLoss(net="alex", trunk_weights=str(path)).load()
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lpips_accepts_a_file_whose_name_tells_its_sha256(tmp_path: Path, trunks: dict[str, Path]) -> None:
    content = trunks["alex"].read_bytes()
    path = tmp_path / f"alexnet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    assert LPIPSLoss(net="alex", trunk_weights=str(path)).load().distance is not None


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL under which a server on this host gives its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_lpips_fetches_a_url_once_and_checks_its_sha256(
    tmp_path: Path, trunks: dict[str, Path], served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder, url = served
    content = trunks["alex"].read_bytes()
    name = f"alexnet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    loss = LPIPSLoss(net="alex", trunk_weights=f"{url}/{name}")
    loss.fetch()
    (folder / name).unlink()
    loss.fetch()
    assert loss.load().distance is not None
    (folder / "alexnet-00000000.pth").write_bytes(content)
    wrong = LPIPSLoss(net="alex", trunk_weights=f"{url}/alexnet-00000000.pth")
    with pytest.raises(
        BadInput, match=r"alexnet-00000000.pth \(sha256 00000000...\) cannot be had .*invalid hash value"
    ):
        wrong.fetch()
    assert not (tmp_path / "hub" / "checkpoints" / "alexnet-00000000.pth").exists()
    with pytest.raises(BadInput, match="ends in -SHA256.pth"):
        LPIPSLoss(net="alex", trunk_weights=f"{url}/alexnet.pth").fetch()
