"""Stage1 models against closed forms, torch.distributions and the AutoencoderKL of diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rqvae.errors import BadInput
from rqvae.models.interfaces import LabeledImageData, Stage1Encodings, Stage1Model
from rqvae.models.stage1.kl_vae import KLVAE
from rqvae.models.stage1.pixel import PixelStage1
from rqvae.models.stage1.posterior import diagonal_kl

SMALL = {"width": 8, "multipliers": [1, 2, 2], "blocks": 1, "norm_groups": 4, "latent_channels": 3}


def small_vae(**changes: object) -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(**{**SMALL, **changes})  # type: ignore[arg-type]


def batch_of(vae: KLVAE, size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32) -> LabeledImageData:
    """Two random images with the numbers the model asks for."""
    rng = torch.Generator().manual_seed(1)
    draws = {name: draw.law((2, *draw.shape), generator=rng).to(dtype) for name, draw in vae.draws((3, *size)).items()}
    return LabeledImageData(img=torch.rand(2, 3, *size, generator=rng, dtype=dtype), draws=draws)


# ---- PixelStage1 ----


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_come_back_to_the_same_byte_within_the_documented_error(patch: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    # Every byte in every colour at least once, in a non-square image.
    bytes_bchw = torch.stack([torch.randperm(256 * 6, generator=rng) % 256 for _ in range(3)]).view(1, 3, 32, 48)
    images_bchw = bytes_bchw.to(dtype) / 255
    xs_recon_bchw = PixelStage1(patch)(LabeledImageData(img=images_bchw)).xs_recon
    assert torch.equal((xs_recon_bchw * 255).round().long(), bytes_bchw)
    bound = 2.0**-26 if dtype == torch.float32 else 2.0**-55
    assert (xs_recon_bchw - images_bchw).abs().max() <= bound
    upper = images_bchw >= 0.25
    assert torch.equal(xs_recon_bchw[upper], images_bchw[upper])


def test_a_patch_becomes_the_channels_of_one_position() -> None:
    images_bchw = torch.rand(2, 3, 8, 12)
    zs_bchw = PixelStage1(4).encode(LabeledImageData(img=images_bchw)).zs
    assert tuple(zs_bchw.shape[1:]) == PixelStage1(4).latent_shape((3, 8, 12)) == (48, 2, 3)
    c, i, j, y, x = 1, 2, 3, 1, 2
    assert torch.equal(zs_bchw[:, (c * 4 + i) * 4 + j, y, x], 2 * images_bchw[:, c, y * 4 + i, x * 4 + j] - 1)


def test_pixel_stage1_has_losses_of_rounding_size_and_no_last_layer() -> None:
    model, batch = PixelStage1(2), LabeledImageData(img=torch.rand(2, 3, 8, 8))
    losses = model.compute_loss(model(batch), batch)
    assert 0 <= losses.loss_total.item() < 2.0**-26
    assert losses.loss_latent.item() == 0
    assert list(model.parameters()) == []
    with pytest.raises(NotImplementedError, match="PixelStage1 has no last layer"):
        model.get_last_layer()


@pytest.mark.parametrize("model", [PixelStage1(4), small_vae()], ids=["pixel", "klvae"])
def test_sizes_that_do_not_divide_are_refused(model: Stage1Model) -> None:
    with pytest.raises(BadInput, match=r"image size 32x30 is not divisible by the (patch|factor) 4 of"):
        model.latent_shape((3, 32, 30))
    with pytest.raises(BadInput, match="image size 30x32"):
        model.encode(LabeledImageData(img=torch.rand(1, 3, 30, 32)))


def test_a_patch_below_one_is_refused() -> None:
    with pytest.raises(BadInput, match=r"PixelStage1\.patch: expected at least 1, got 0"):
        PixelStage1(0)


# ---- KLVAE against diffusers ----


def resnet_keys(ours: str, theirs: str) -> dict[str, str]:
    names = ("norm1", "conv1", "norm2", "conv2")
    return {f"{ours}.{n}": f"{theirs}.{n}" for n in names} | {f"{ours}.shortcut": f"{theirs}.conv_shortcut"}


def side_keys(ours: str, stages: str, resampler: str, levels: int, blocks: int, attention: bool) -> dict[str, str]:
    """Our module names of an encoder or decoder, and diffusers'."""
    keys = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    keys |= resnet_keys("mid.0", "mid_block.resnets.0")
    keys |= resnet_keys(f"mid.{1 + attention}", "mid_block.resnets.1")
    if attention:
        keys |= {"mid.1.norm": "mid_block.attentions.0.group_norm", "mid.1.out": "mid_block.attentions.0.to_out.0"}
    for i in range(levels):
        for j in range(blocks):
            keys |= resnet_keys(f"stages.{i}.{j}", f"{stages}.{i}.resnets.{j}")
        keys[f"stages.{i}.{blocks}.conv"] = f"{stages}.{i}.{resampler}.0.conv"
    return {f"{ours}.{k}": f"{ours}.{v}" for k, v in keys.items()}


def diffusers_state(vae: KLVAE, levels: int, blocks: int, attention: bool) -> dict[str, Tensor]:
    """Our weights under diffusers' names; its q, k and v are three layers."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    names |= side_keys("encoder", "down_blocks", "downsamplers", levels, blocks, attention)
    names |= side_keys("decoder", "up_blocks", "upsamplers", levels, blocks + 1, attention)
    state: dict[str, Tensor] = {}
    for key, value in vae.state_dict().items():
        module, kind = key.rsplit(".", 1)
        if module.endswith(".qkv"):
            place = f"{module.split('.')[0]}.mid_block.attentions.0"
            state |= {f"{place}.to_{n}.{kind}": v for n, v in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[f"{names[module]}.{kind}"] = value
    return state


@pytest.mark.parametrize(
    ("multipliers", "blocks", "attention"), [([1, 2, 4], 1, True), ([1, 2, 2, 3], 2, True), ([1, 2], 1, False)]
)
def test_outputs_equal_diffusers_autoencoder_kl(multipliers: list[int], blocks: int, attention: bool) -> None:
    vae = small_vae(multipliers=multipliers, blocks=blocks, attention=attention).eval()
    with torch.no_grad():  # norms start at 1 and 0, where a swapped pair would go unseen
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    levels = len(multipliers)
    reference: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(8 * m for m in multipliers),
        layers_per_block=blocks,
        latent_channels=3,
        norm_num_groups=4,
        mid_block_add_attention=attention,
    )
    reference.eval().load_state_dict(diffusers_state(vae, levels, blocks, attention))
    images_bchw = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        posterior = reference.encode(2 * images_bchw - 1).latent_dist
        decoded = reference.decode(posterior.mean).sample
        encodings = vae.encode(LabeledImageData(img=images_bchw))
        xs_recon_bchw = vae.decode(encodings).xs_recon
    assert encodings.additional_attr is not None
    torch.testing.assert_close(encodings.zs, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encodings.additional_attr["logvar"], posterior.logvar, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * xs_recon_bchw - 1, decoded, rtol=1e-5, atol=1e-5)


# ---- KLVAE: latent, losses, schema ----


@pytest.mark.parametrize(("multipliers", "factor"), [([1, 1, 1], 4), ([1, 1, 1, 1], 8), ([1, 1, 1, 1, 1], 16)])
def test_factor_follows_from_the_multipliers(multipliers: list[int], factor: int) -> None:
    vae = small_vae(multipliers=multipliers)
    batch = batch_of(vae, (32, 48))
    expected = (3, 32 // factor, 48 // factor)
    assert vae.latent_shape((3, 32, 48)) == expected
    assert tuple(vae.encode(batch).zs.shape) == (2, *expected)
    assert vae(batch).xs_recon.shape == (2, 3, 32, 48)


def test_the_posterior_draw_is_scaled_and_shifted_and_absent_means_the_mean() -> None:
    vae = small_vae().double()
    batch = batch_of(vae, dtype=torch.float64)
    assert batch.draws is not None
    encodings, attr = vae.encode(batch), vae.encode(batch).additional_attr
    assert attr is not None
    expected = Normal(attr["mu"], (0.5 * attr["logvar"]).exp()).icdf(Normal(0.0, 1.0).cdf(batch.draws["posterior"]))
    torch.testing.assert_close(encodings.zs, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(vae.encode(LabeledImageData(img=batch.img)).zs, attr["mu"])
    on_the_mean = small_vae(sample_posterior=False).double()
    assert torch.equal(on_the_mean.encode(batch).zs, attr["mu"])
    assert on_the_mean.draws((3, 16, 16)) == {}


def test_declared_draw_is_standard_normal_of_the_latents_shape() -> None:
    draw = small_vae().draws((3, 64, 96))["posterior"]
    assert draw.shape == (3, 16, 24)
    numbers = draw.law((20000,), generator=torch.Generator().manual_seed(0))
    assert abs(numbers.mean().item()) < 4 / math.sqrt(20000)
    assert abs(numbers.std().item() - 1) < 4 / math.sqrt(2 * 20000)


def test_logvar_is_clamped() -> None:
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.bias.copy_(torch.tensor([0.0, 0, 0, 1000, -1000, 0]))  # type: ignore[union-attr]
    attr = vae.encode(batch_of(vae)).additional_attr
    assert attr is not None
    assert attr["logvar"].amax().item() == 20
    assert attr["logvar"].amin().item() == -30


def test_kl_equals_torch_distributions() -> None:
    mu, logvar = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    divergence = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.zeros_like(mu), 1.0))
    torch.testing.assert_close(diagonal_kl(mu, logvar), divergence.sum(dim=(1, 2, 3)).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("recon", ["l1", "l2"])
def test_losses_are_in_image_units_and_weighted(recon: str) -> None:
    vae = small_vae(recon=recon, kl_weight=0.25).double()
    batch = batch_of(vae, dtype=torch.float64)
    output = vae(batch)
    losses = vae.compute_loss(output, batch)
    assert output.additional_attr is not None
    difference = output.xs_recon - batch.require_img()
    expected = difference.abs().sum() if recon == "l1" else (difference**2).sum()
    torch.testing.assert_close(losses.loss_recon, expected / (2 * 3 * 16 * 16), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.loss_latent, 0.25 * diagonal_kl(**output.additional_attr), rtol=1e-12, atol=0)
    assert losses["loss_total"].dtype == torch.float64


def test_every_parameter_has_a_gradient_that_finite_differences_confirm() -> None:
    vae = small_vae(kl_weight=1e-3, recon="l2").double()
    batch = batch_of(vae, dtype=torch.float64)

    def loss() -> Tensor:
        return vae.compute_loss(vae(batch), batch).loss_total

    loss().backward()
    gradients = [p.grad for p in vae.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    rng = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in vae.parameters()]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    sides, step = [], 1e-6
    with torch.no_grad():
        for change in (step, -2 * step):
            for p, d in zip(vae.parameters(), directions, strict=True):
                p.add_(change * d)
            sides.append(loss())
    torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), slope, rtol=1e-6, atol=0)


def test_an_image_is_reconstructed_the_same_in_any_batch_and_in_bf16_autocast_the_latent_stays_fp32() -> None:
    vae = small_vae(multipliers=[1, 2]).eval()
    batch = batch_of(vae, (32, 48))
    alone = LabeledImageData(img=batch.require_img()[1:], draws={"posterior": (batch.draws or {})["posterior"][1:]})
    torch.testing.assert_close(vae(batch).xs_recon[1:], vae(alone).xs_recon, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(batch)
        losses = vae.compute_loss(output, batch)
    assert output.additional_attr is not None
    assert output.additional_attr["logvar"].dtype == torch.float32
    assert losses.loss_total.dtype == torch.float32
    torch.testing.assert_close(losses.loss_total, vae.compute_loss(vae(batch), batch).loss_total, rtol=0.02, atol=0)


def test_last_layer_is_the_weight_that_makes_the_image() -> None:
    vae = small_vae()
    weight = vae.get_last_layer()
    assert weight.shape == (3, 8, 3, 3)
    with torch.no_grad():
        weight.zero_()
        vae.decoder.conv_out.bias.fill_(0.5)  # type: ignore[union-attr]
    assert torch.equal(vae(batch_of(vae)).xs_recon, torch.full((2, 3, 16, 16), 0.75))


def test_loss_of_an_output_that_is_not_from_forward_is_refused() -> None:
    vae = small_vae()
    output = vae.decode(Stage1Encodings(zs=torch.zeros(2, 3, 4, 4)))
    with pytest.raises(ValueError, match="expected mu and logvar"):
        vae.compute_loss(output, batch_of(vae))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_groups": 3}, "norm_groups: expected a divisor of 8 channels, got 3"),
        ({"multipliers": []}, r"KLVAE\.multipliers: expected at least 1, got 0"),
        ({"blocks": 0}, r"KLVAE\.blocks: expected at least 1, got 0"),
    ],
)
def test_wrong_constructor_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        small_vae(**changes)


def test_the_constructors_are_a_configuration_schema() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--stage1", type=Stage1Model)
    path = "rqvae.models.stage1.kl_vae.KLVAE"
    config = parser.parse_object({"stage1": {"class_path": path, "init_args": {**SMALL, "recon": "l2"}}})
    vae = parser.instantiate(config).stage1
    assert isinstance(vae, KLVAE)
    assert vae.latent_shape((3, 32, 32)) == (3, 8, 8)
    pixel = {"class_path": "rqvae.models.stage1.pixel.PixelStage1", "init_args": {"patch": 2}}
    assert parser.instantiate(parser.parse_object({"stage1": pixel})).stage1.patch == 2
