"""The U-Net and the U-ViT: against diffusers' and torch's networks, by symmetry, by hand count and by training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from rqvae.errors import BadInput
from rqvae.models.interfaces import ActionCondition, ClassCondition, DataSpec
from rqvae.models.layers.film import FilmResBlock, MapAttention, TimeAndCondition
from rqvae.models.stage2.unet import UNet
from rqvae.models.stage2.uvit import TransformerMiddle, UViT
from rqvae.randomness import generator

F64 = torch.float64
CLASSES = DataSpec((3, 8, 16), num_classes=3)
ACTIONS = DataSpec((3, 8, 16), num_actions=5, history=2)
PLAIN = DataSpec((3, 8, 16))
OBLONG = (3, 8, 16)


def small_unet(latent_shape: tuple[int, ...] = OBLONG, spec: DataSpec = CLASSES, **changes: Any) -> UNet:
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 2, 3], "blocks": 1, "attention": [1], "heads": 2, "norm_groups": 4}
    return UNet(latent_shape, spec, **(sizes | changes))


def small_uvit(latent_shape: tuple[int, ...] = OBLONG, spec: DataSpec = CLASSES, **changes: Any) -> UViT:
    torch.manual_seed(0)
    sizes = {
        "width": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "norm_groups": 4,
        "token_width": 16,
        "depth": 2,
        "heads": 2,
    }
    return UViT(latent_shape, spec, **(sizes | changes))


BOTH = pytest.mark.parametrize("make", [small_unet, small_uvit])


def condition_of(spec: DataSpec, batch: int) -> Any:
    slots = torch.arange(2 * batch).view(batch, 2) % 5
    return {
        CLASSES: ClassCondition(torch.arange(batch) % 3, 3),
        ACTIONS: ActionCondition(None, slots, torch.ones(batch, 2).bool(), 5),
        PLAIN: None,
    }[spec]


def randomised(module: nn.Module) -> Any:
    """Every parameter normal: zero-initialised layers would hide what is before them."""
    rng = generator(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Against networks of others


def diffusers_unet(
    ours: UNet, multipliers: list[int], width: int, blocks: int, attention: int, *, groups: int, **more: Any
) -> Any:
    """ADM's U-Net in diffusers, attention at one level and the middle, with the steering vector of ours."""
    kinds = [i == attention for i in range(len(multipliers))]
    theirs = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=[width * m for m in multipliers],
        layers_per_block=blocks,
        down_block_types=["AttnDownBlock2D" if kind else "ResnetDownsampleBlock2D" for kind in kinds],
        up_block_types=["AttnUpBlock2D" if kind else "ResnetUpsampleBlock2D" for kind in reversed(kinds)],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        norm_eps=1e-6,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,  # else the middle's attention has no norm at all
        **more,
    )

    class Before(nn.Module):
        """What diffusers' blocks expect: the embedding before its SiLU, which ours has only after it."""

        def forward(self, t: Tensor, *_: Any) -> Tensor:
            label = condition_of(CLASSES, len(t))
            return ours.steering.time(t) + ours.steering.condition(label)

    theirs.time_proj, theirs.time_embedding = nn.Identity(), Before()
    return theirs


def their_blocks(theirs: UNet2DModel) -> list[tuple[nn.Module, nn.Module | None]]:
    """Their residual blocks with the attention after each, in the order of the data."""
    found: list[tuple[nn.Module, nn.Module | None]] = []
    for block in theirs.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        found += [*zip(block.resnets, attentions, strict=True), *((d, None) for d in block.downsamplers or [])]
    found += [(theirs.mid_block.resnets[0], theirs.mid_block.attentions[0]), (theirs.mid_block.resnets[1], None)]
    for block in theirs.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        found += [*zip(block.resnets, attentions, strict=True), *((u, None) for u in block.upsamplers or [])]
    return found


def our_blocks(ours: UNet) -> list[tuple[FilmResBlock, MapAttention | None]]:
    steps = [*ours.u.down, ours.u.middle.first, ours.u.middle.second]
    for level in ours.u.up:
        steps += [*level.blocks, *([level.enlarge] if level.enlarge is not None else [])]
    return [(s, None) if isinstance(s, FilmResBlock) else (s.block, s.attention) for s in steps]


def copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict(), strict=True)


def load_into_diffusers(ours: UNet, theirs: UNet2DModel) -> None:
    copy(ours.u.conv_in, theirs.conv_in)
    copy(ours.u.norm_out, theirs.conv_norm_out)
    copy(ours.u.conv_out, theirs.conv_out)
    for (block, attention), (their_block, their_attention) in zip(our_blocks(ours), their_blocks(theirs), strict=True):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            copy(getattr(block, name), getattr(their_block, name))
        copy(block.film, their_block.time_emb_proj)
        if isinstance(block.shortcut, nn.Conv2d):
            copy(block.shortcut, their_block.conv_shortcut)
        assert (attention is None) == (their_attention is None)
        if attention is not None:
            copy(attention.norm, their_attention.group_norm)
            copy(attention.attention.out, their_attention.to_out[0])
            for name in ("weight", "bias"):
                parts = getattr(attention.attention.qkv, name).chunk(3)
                for letter, part in zip("qkv", parts, strict=True):
                    getattr(getattr(their_attention, f"to_{letter}"), name).data.copy_(part)


def test_unet_answers_as_the_one_of_diffusers() -> None:
    ours = randomised(small_unet(width=8, multipliers=[1, 2, 2], blocks=2, attention=[2], heads=2)).double().eval()
    theirs = diffusers_unet(ours, [1, 2, 2], 8, 2, 2, attention_head_dim=8, groups=4).double().eval()
    load_into_diffusers(ours, theirs)
    x, t_b = normal(3, *OBLONG), torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    with torch.no_grad():
        answer = ours(x, t_b, condition_of(CLASSES, 3))
        expected = theirs(x, timestep=t_b).sample
    assert answer.std() > 0.1
    torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)


def test_adm_of_imagenet_64_has_its_296_million_parameters() -> None:
    """Dhariwal & Nichol 2021, table 4 (3 output channels here); all but the steering by diffusers' count."""
    spec = DataSpec((3, 64, 64), num_classes=1000)
    sizes = {"width": 192, "multipliers": [1, 2, 3, 4], "blocks": 3}
    with torch.device("meta"):
        whole = UNet((3, 64, 64), spec, **sizes, attention=[1, 2, 3])
        one = UNet((3, 64, 64), spec, **sizes, attention=[2])
        theirs = diffusers_unet(one, [1, 2, 3, 4], 192, 3, 2, attention_head_dim=64, groups=32)
    assert round(count(whole) / 1e6) == 296
    assert count(one.u) == count(theirs)
    per_attention = [2 * c + 4 * c * (c + 1) for c in (384, 768)]
    assert count(whole.u) - count(one.u) == 7 * sum(per_attention)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_over_a_map_is_torch_multihead_attention(heads: int) -> None:
    ours = randomised(MapAttention(16, heads, groups=4)).double()
    theirs = nn.MultiheadAttention(16, heads, batch_first=True, dtype=F64)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (
        ours.attention.qkv.weight.data,
        ours.attention.qkv.bias.data,
    )
    copy(ours.attention.out, theirs.out_proj)
    x = normal(2, 16, 3, 5)
    tokens = ours.norm(x).permute(0, 2, 3, 1).reshape(2, 15, 16)
    mixed, _ = theirs(tokens, tokens, tokens)
    torch.testing.assert_close(ours(x), x + mixed.view(2, 3, 5, 16).permute(0, 3, 1, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_does_not_know_where_a_pixel_is(heads: int) -> None:
    attention = randomised(MapAttention(16, heads, groups=4)).double()
    x, order = normal(2, 16, 3, 5), torch.randperm(15, generator=generator(1))
    moved = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(attention(moved), attention(x).flatten(2)[:, :, order].view_as(x), rtol=0, atol=1e-12)


# Symmetry: with kernels that a mirror leaves alone, mirroring and the network commute


@pytest.mark.parametrize("mirror", [lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)])
def test_unet_with_symmetric_kernels_commutes_with_the_mirror(mirror: Callable[[Tensor], Tensor]) -> None:
    model = randomised(small_unet()).double()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = (layer.weight.data + mirror(layer.weight.data)) / 2
    x, t_b, condition = normal(2, *OBLONG), torch.tensor([0.2, 0.9], dtype=F64), condition_of(CLASSES, 2)
    mirrored = mirror(x)
    twin = small_unet(tuple(mirrored.shape[1:])).double()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(mirrored, t_b, condition), mirror(model(x, t_b, condition)), rtol=0, atol=1e-10)


def test_transformer_knows_a_place_by_its_position_embedding_only() -> None:
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 4.0, "dropout": 0.0}
    middle = randomised(TransformerMiddle(8, 3, 5, **sizes)).double()
    x, active, order = normal(2, 8, 3, 5), normal(2, 16, seed=1), torch.randperm(15, generator=generator(1))

    @torch.no_grad()
    def difference() -> float:
        moved = middle(x.flatten(2)[:, :, order].view_as(x), active)
        return float((moved - middle(x, active).flatten(2)[:, :, order].view_as(x)).abs().max())

    assert difference() > 1e-2
    middle.position_nd.zero_()
    assert difference() < 1e-10


@BOTH
def test_samples_do_not_see_each_other(make: Any) -> None:
    model = randomised(make()).double().eval()
    x, t_b, label = normal(3, *OBLONG), torch.tensor([0.1, 0.5, 0.9], dtype=F64), torch.arange(3)
    together = model(x, t_b, ClassCondition(label, 3))
    alone = torch.cat([model(x[i : i + 1], t_b[i : i + 1], ClassCondition(label[i : i + 1], 3)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    other = model(x, t_b, ClassCondition(label.flip(0), 3))
    assert [(together[i] - other[i]).abs().max().item() > 1e-3 for i in range(3)] == [True, False, True]
    assert (model(x, t_b.flip(0), ClassCondition(label, 3)) - together)[0].abs().max() > 1e-3


# Shapes and counts


def sides_and_channels(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(C, h, w) after each residual block, in the order of the data."""
    seen: list[tuple[int, ...]] = []
    for layer in model.modules():
        if isinstance(layer, FilmResBlock | TransformerMiddle):
            layer.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    model(torch.zeros(1, *shape), torch.rand(1), condition_of(CLASSES, 1))
    return seen


def test_every_level_of_the_unet_has_its_shape() -> None:
    assert sides_and_channels(small_unet(), OBLONG) == [
        *[(8, 8, 16), (8, 4, 8)],
        *[(16, 4, 8), (16, 2, 4)],
        *[(24, 2, 4), (24, 2, 4), (24, 2, 4)],
        *[(24, 2, 4), (24, 2, 4), (24, 4, 8)],
        *[(16, 4, 8), (16, 4, 8), (16, 8, 16)],
        *[(8, 8, 16), (8, 8, 16)],
    ]


def test_every_level_of_the_uvit_has_its_shape() -> None:
    assert sides_and_channels(small_uvit(), OBLONG) == [
        *[(8, 8, 16), (8, 4, 8)],
        *[(16, 4, 8), (16, 2, 4)],
        *[(16, 2, 4), (16, 2, 4), (16, 4, 8)],
        *[(16, 4, 8), (16, 4, 8), (16, 8, 16)],
        *[(8, 8, 16), (8, 8, 16)],
    ]


def test_parameters_of_the_uvit_by_hand() -> None:
    model = small_uvit()

    def conv(i: int, o: int, side: int = 3) -> int:
        return side**2 * i * o + o

    def block(i: int, o: int) -> int:
        shortcut = conv(i, o, 1) if i != o else 0
        return 2 * i + conv(i, o) + 17 * 2 * o + 2 * o + conv(o, o) + shortcut

    down = [block(8, 8), block(8, 8), block(8, 16), block(16, 16)]
    up = [block(32, 16), block(16, 16), block(32, 16), block(24, 16), block(16, 16), block(24, 8), block(16, 8)]
    d = 16
    transformer = 2 * (6 * d * (d + 1) + 4 * d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1))
    middle = (16 + 1) * d + transformer + 2 * d + (d + 1) * 16
    steering = (256 + 1) * d + (d + 1) * d + 4 * d
    ends = conv(3, 8) + 2 * 8 + conv(8, 3)
    assert count(model.u.middle) == middle
    assert count(model) == sum(down) + sum(up) + middle + steering + ends


def test_dropout_of_the_uvit_is_at_the_lowest_resolution_only() -> None:
    model = small_uvit(dropout=0.5)
    sides: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and layer.p:
            layer.register_forward_hook(lambda _m, i, _o: sides.add(i[0].shape[-1] if i[0].ndim == 4 else 0))
    model.train()(torch.zeros(1, *OBLONG), torch.rand(1), condition_of(CLASSES, 1))
    assert sides == {0, 4, 8}  # tokens, the map beside them, and its own enlargement


# Training


@BOTH
@pytest.mark.parametrize("spec", [CLASSES, ACTIONS, PLAIN], ids=["classes", "actions", "plain"])
def test_every_parameter_learns_within_three_steps_from_zero(make: Any, spec: DataSpec) -> None:
    """Three, as the network opens from the end: last convolution, then blocks' ends and gates, then the rest."""
    model = make(spec=spec).train()
    x, t_b, target = normal(4, *OBLONG).float(), torch.rand(4), normal(4, *OBLONG, seed=1).float()
    condition = condition_of(spec, 4)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(3):
        answer = model(x, t_b, condition)
        assert answer.shape == x.shape
        assert step or torch.equal(answer, torch.zeros_like(answer))
        optimizer.zero_grad()
        (answer - target).square().mean().backward()
        optimizer.step()
    assert [k for k, p in model.named_parameters() if torch.equal(p, before[k])] == []


@BOTH
def test_one_batch_is_learnt(make: Any) -> None:
    model = make()
    x, t_b, target = normal(4, *OBLONG).float(), torch.rand(4), normal(4, *OBLONG, seed=1).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(x, t_b, condition_of(CLASSES, 4)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item())
    assert losses[-1] < 0.5 * losses[0]


@BOTH
def test_bf16_autocast_is_near_float64(make: Any) -> None:
    model = randomised(make()).eval()
    x, t_b, condition = normal(2, *OBLONG), torch.tensor([0.2, 0.7], dtype=F64), condition_of(CLASSES, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(x.float(), t_b.float(), condition)
    with torch.no_grad():
        exact = model.double()(x, t_b, condition)
    assert (low.dtype, exact.dtype) == (torch.bfloat16, F64)
    assert float((low.double() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small_unet((3, 8, 18)), "stage2.multipliers: expected latent sides divisible by 4, got 8 x 18"),
        (lambda: small_uvit((3, 6, 8)), "stage2.multipliers: expected latent sides divisible by 4, got 6 x 8"),
        (lambda: small_unet((64, 8)), r"stage2: expected a latent \(C, h, w\), got \(64, 8\)"),
        (lambda: small_unet(attention=[3]), r"stage2.attention: expected levels 0 to 2, got \[3\]"),
        (lambda: small_unet(multipliers=[]), r"stage2.multipliers: expected at least one number, each >= 1, got \[\]"),
        (lambda: small_unet(multipliers=[1, 0]), r"stage2.multipliers: .* got \[1, 0\]"),
        (lambda: small_unet(blocks=0), "stage2.blocks: expected a number >= 1, got 0"),
        (lambda: small_uvit(depth=0), "stage2.depth: expected a number >= 1, got 0"),
        (lambda: small_unet(norm_groups=3), "norm_groups: expected a divisor of 8 channels, got 3"),
        (lambda: small_unet(heads=3), "width: expected a multiple of heads = 3, got 16"),
        (lambda: small_uvit(token_width=18), "expected a multiple of 4 for the position embedding, got 18"),
        (lambda: TimeAndCondition(DataSpec(OBLONG, num_mask_classes=2), 8), "num_mask_classes 2"),
        (
            lambda: small_uvit()(torch.zeros(2, 3, 8, 8), torch.rand(2), condition_of(CLASSES, 2)),
            r"latent: expected \(B, 3, 8, 16\), got \(2, 3, 8, 8\)",
        ),
        (lambda: small_unet()(torch.zeros(1, *OBLONG), torch.rand(1), None), "expected ClassCondition of 3 .*NoneType"),
        (
            lambda: small_unet(spec=PLAIN)(torch.zeros(1, *OBLONG), torch.rand(1), condition_of(CLASSES, 1)),
            "condition: expected None",
        ),
    ],
)
def test_bad_input_is_named(make: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words) as error:
        make()
    assert "\n" not in str(error.value)
