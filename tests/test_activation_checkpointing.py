"""Recomputed blocks: the same gradients with less kept for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rqvae.backends.compiling import compile_in_place
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec, LabeledImageData
from rqvae.models.blocks import listed_blocks, recompute_activations
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage2.dit import DiT
from rqvae.models.stage2.unet import UNet
from rqvae.models.stage2.uvit import UViT
from tests.conftest import assert_same, only, tensors
from tests.test_loop import NoHostSync

SPEC, SHAPE = DataSpec((3, 16, 16), num_classes=10), (4, 8, 8)
Forward = Callable[[nn.Module], Tensor]


def backbone(module: nn.Module) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    dtype = next(module.parameters()).dtype
    x, t = torch.randn(4, *SHAPE, generator=draws).to(dtype), torch.rand(4, generator=draws).to(dtype)
    return module(x, t, ClassCondition(torch.arange(4), 10))


def autoencoder(module: nn.Module) -> Tensor:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return module(LabeledImageData(img=images)).xs_recon


MODELS: dict[str, tuple[Callable[[], nn.Module], Forward]] = {
    "dit": (lambda: DiT(SHAPE, SPEC, depth=3, width=32, heads=2, dropout=0.2), backbone),
    "unet": (
        lambda: UNet(
            SHAPE, SPEC, width=16, multipliers=[1, 2], blocks=1, attention=[1], heads=2, norm_groups=8, dropout=0.2
        ),
        backbone,
    ),
    "uvit": (
        lambda: UViT(SHAPE, SPEC, token_width=32, depth=2, heads=2, width=16, multipliers=[1], blocks=1, norm_groups=8),
        backbone,
    ),
    "klvae": (lambda: KLVAE(width=16, multipliers=[1, 2], blocks=1, norm_groups=8, dropout=0.2), autoencoder),
}


def blocks_of(module: nn.Module) -> list[nn.Module]:
    return module.repeated_blocks() if isinstance(module, KLVAE) else listed_blocks(module)


def made(name: str, recomputed: bool) -> nn.Module:
    torch.manual_seed(0)
    module = MODELS[name][0]().double().train()
    for p in module.parameters():  # not the zeros that hide the blocks at the start
        nn.init.normal_(p, std=0.1)
    if recomputed:
        recompute_activations(blocks_of(module))
    return module


def gradients(module: nn.Module, forward: Forward) -> tuple[list[Tensor], int]:
    """Gradients, and the bytes that the forward kept for them besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = forward(module).square().mean()
    loss.backward()
    return [p.grad for p in module.parameters() if p.grad is not None], sum(
        x.untyped_storage().nbytes() for x in kept.values()
    )


@pytest.mark.parametrize("name", MODELS)
def test_same_gradients_from_less_memory(name: str) -> None:
    """Bit for bit, with dropout."""
    plain, recomputed = made(name, False), made(name, True)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    expected, whole = gradients(plain, MODELS[name][1])
    found, less = gradients(recomputed, MODELS[name][1])
    assert len(expected) == len(found) > 10
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert less < 0.5 * whole, (less, whole)


def test_the_dropout_of_the_comparison_matters() -> None:
    module = made("dit", True)
    torch.manual_seed(7)
    first = backbone(module)
    torch.manual_seed(8)
    assert not torch.equal(first, backbone(module))


def test_a_copy_computes_with_its_own_weights() -> None:
    module = made("dit", True).eval()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
        assert not torch.equal(backbone(twin), backbone(module))
        plain = made("dit", False).eval()
        plain.load_state_dict(twin.state_dict())
        assert torch.equal(backbone(twin), backbone(plain))


def test_blocks_of_one_class_stay_of_one_class() -> None:
    """Else each of them would be compiled by itself."""
    blocks = blocks_of(made("dit", True))
    assert len({type(block) for block in blocks}) == 1
    assert type(blocks[0]).__name__ == "AdaLNZeroBlock"


@pytest.mark.slow
def test_compiled_dropout_is_recomputed_too() -> None:
    """Inductor's own random numbers, which are not eager's, are the same in the second forward."""
    found = []
    for recomputed in (False, True):
        torch._dynamo.reset()
        module = made("dit", recomputed).float()
        for block in blocks_of(module):
            compile_in_place(block, "inductor")
        found.append(gradients(module, backbone)[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_training_with_recomputed_blocks_is_the_same_run(tmp_path: Path, cli: Any) -> None:
    for name in ("stage1_gan", "stage2_uvit"):
        line = ["train", f"configs/debug/{name}.yaml", "--project", name, "--run-name", "r", "--train.steps", 3]
        line += ["--pictures.every", "null", "--data.workers", 0]
        line += ["--online_eval.every", "null"] if name == "stage1_gan" else []
        assert cli(*line, "--save-dir", tmp_path / "none") == 0
        assert cli(*line, "--save-dir", tmp_path / "blocks", "--train.activation_checkpointing", "blocks") == 0
        a, b = (tensors(only(tmp_path / which / name), 3) for which in ("none", "blocks"))
        assert_same(a, b)


def test_no_host_synchronisation() -> None:
    module = made("dit", True)
    with NoHostSync():
        backbone(module).square().mean().backward()
