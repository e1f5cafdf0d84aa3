"""Masks inside the models: layout, class vectors, null condition, weights of the loss, and the original network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rqvae.diffusion.sampling import Sampler
from rqvae.diffusion.vp import VP
from rqvae.diffusion.weighting import P2
from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageData, MaskCondition
from rqvae.models.connectors.scale_shift import ScaleShift
from rqvae.models.ema import EMA
from rqvae.models.interfaces import Stage1Encodings
from rqvae.models.layers.mask_embedding import MaskDistributionEmbedding, class_distribution, soft_one_hot
from rqvae.models.stage1.untrained_autoencoder_kl import UntrainedAutoencoderKL
from rqvae.models.stage2.diffusion import LatentDiffusion
from rqvae.models.stage2.dit import DiT
from rqvae.models.stage2.legacy_unet import LegacyUNet
from rqvae.models.stage2.unet import UNet
from rqvae.trainers.clock import Clock
from rqvae.trainers.schedules import OneCycle

K = 5
SPEC = DataSpec((3, 32, 32), num_mask_classes=K)
LATENT = (4, 8, 8)
Make = Callable[..., nn.Module]

BACKBONES: dict[str, Make] = {
    "dit": lambda: DiT(LATENT, SPEC, depth=2, width=32, heads=2),
    "unet": lambda: UNet(LATENT, SPEC, width=16, multipliers=[1, 2], blocks=1, attention=[1], norm_groups=4),
    "legacy": lambda: LegacyUNet(LATENT, SPEC, width=16, multipliers=[1, 2], dropout=0.0),
}


def moved(make: Make) -> nn.Module:
    """The network with weights that are all random: outputs that begin at zero show nothing."""
    torch.manual_seed(0)
    network = make().eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.1)
    return network


def answer(network: nn.Module, mask_bhw: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(1, *LATENT).expand(len(mask_bhw), -1, -1, -1)
    with torch.no_grad():
        return network(x, torch.full((len(mask_bhw),), 0.4), MaskCondition(mask_bhw, K))


def test_soft_one_hot_is_the_mean_over_areas() -> None:
    """Against a loop over the areas."""
    torch.manual_seed(0)
    mask = torch.randint(0, K + 1, (2, 12, 8))
    soft = soft_one_hot(mask, K, (3, 4), torch.float64)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                area = mask[b, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2].flatten()
                shares = torch.bincount(area, minlength=K + 1).double() / 8
                assert torch.allclose(soft[b, :, i, j], shares, rtol=0, atol=1e-15)
    with pytest.raises(BadInput, match="expected sides divisible by the latent's 5 x 4, got 12 x 8"):
        soft_one_hot(mask, K, (5, 4), torch.float64)


@pytest.mark.parametrize(
    ("counts", "printed"),
    [
        ([263, 109, 129896, 3049, 128827], "[1.0033e-03, 4.1580e-04, 4.9551e-01, 1.1631e-02, 4.9144e-01]"),
        ([369, 152, 129791, 2667, 129165], "[1.4076e-03, 5.7983e-04, 4.9511e-01, 1.0174e-02, 4.9273e-01]"),
    ],
)
def test_class_vectors_are_those_of_the_original_log(counts: list[int], printed: str) -> None:
    """Masks of 512 x 512 with the log's pixel counts give the numbers that it prints, to every digit."""
    mask = torch.repeat_interleave(torch.arange(5), torch.tensor(counts)).reshape(1, 512, 512)
    shares = class_distribution(mask, 5, torch.float32)[0, :5].tolist()
    assert "[" + ", ".join(f"{share:.4e}" for share in shares) + "]" == printed


def test_the_original_network_has_its_parameters() -> None:
    with torch.device("meta"):
        network = LegacyUNet((4, 64, 64), DataSpec((3, 512, 512), num_mask_classes=5))
    assert sum(p.numel() for p in network.parameters()) == 172_101_124


def test_the_original_network_answers_as_the_published_one() -> None:
    """With weights sin(0), sin(1), ... / 2 in every tensor; DiffInfinite's own modules gave the numbers, in fp64.

    They take the class vector as the fork writes it, shares times table; their sinusoids are fp32.
    """
    network = LegacyUNet((4, 8, 8), SPEC, width=8, multipliers=[1, 2]).eval().double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_((torch.arange(p.numel(), dtype=torch.float64).sin() * 0.5).view_as(p))
    mask = torch.zeros(2, 32, 32, dtype=torch.int64)
    mask[0, :, 10:], mask[1, 8:], mask[1, :, 20:] = 3, 4, 2
    x = (torch.arange(2 * 4 * 8 * 8, dtype=torch.float64) * 0.7).cos().view(2, 4, 8, 8)
    with torch.no_grad():
        out = network(x, torch.tensor([0.25, 0.7], dtype=torch.float64), MaskCondition(mask, K))
    first = [-0.951965528, 5.536226279, -0.081993923, -4.888767739]
    second = [2.360112666, -3.690225431, -0.709174046, 4.52019343]
    assert out[:, :, 3, 5].flatten().tolist() == pytest.approx(first + second, abs=1e-6)
    assert out.abs().mean().item() == pytest.approx(1.5586894574935501, abs=1e-6)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_swapped_halves_are_another_condition(name: str) -> None:
    """The shares of the classes are the same, so only the layout can tell."""
    mask = torch.full((2, 32, 32), 2)
    mask[0, :, 16:], mask[1, :, :16] = 4, 4
    first, second = answer(moved(BACKBONES[name]), mask)
    assert (first - second).abs().max() > 1e-2


def test_the_original_network_cannot_tell_swapped_halves() -> None:
    mask = torch.full((2, 32, 32), 2)
    mask[0, :, 16:], mask[1, :, :16] = 4, 4
    network = moved(BACKBONES["legacy"])
    first, second = answer(network, mask)
    assert torch.allclose(first, second, rtol=0, atol=1e-5)
    one_class = answer(network, torch.full((1, 32, 32), 2))
    assert (first - one_class).abs().max() > 1e-4  # the shares it does see
    unknown_half = torch.where(mask[:1] == 4, 0, mask[:1])
    flipped = answer(network, torch.cat((unknown_half, unknown_half.flip(-1))))
    assert (flipped[0] - flipped[1]).abs().max() > 1e-4  # and where class 0 is


def test_null_in_the_original_network_is_class_0() -> None:
    first, second = answer(
        moved(BACKBONES["legacy"]), torch.stack((torch.zeros(32, 32), torch.full((32, 32), K))).long()
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_null_has_an_embedding_of_its_own(name: str) -> None:
    """Not zeros, and not a class: its row of the table is used, gets a gradient, and gives another answer."""
    embedding = MaskDistributionEmbedding(K, 8)
    null = MaskCondition(torch.zeros(2, 32, 32, dtype=torch.int64), K).null()
    vector = embedding(null)
    assert torch.allclose(vector, embedding.table.weight[K].expand(2, -1))
    vector.sum().backward()
    assert embedding.table.weight.grad is not None
    assert embedding.table.weight.grad.abs().sum(1).ne(0).tolist() == [False] * K + [True]
    masks = torch.stack([torch.full((32, 32), k) for k in range(K + 1)])
    answers = answer(moved(BACKBONES[name]), masks)
    differences = (answers[:, None] - answers[None]).abs().amax((2, 3, 4))
    assert differences[~torch.eye(K + 1, dtype=torch.bool)].min() > 1e-3


def diffusion(**more: Any) -> LatentDiffusion:
    arguments: dict[str, Any] = {"path": VP("cosine"), "prediction": "v", "drop_condition": 0.0, **more}
    return LatentDiffusion(LATENT, SPEC, backbone=lambda *_: BACKBONES["unet"](), **arguments)


def batch(size: int, seed: int = 0, drop: torch.Tensor | None = None) -> LabeledImageData:
    torch.manual_seed(seed)
    draws = {"noise": torch.randn(size, *LATENT), "t": torch.rand(size)}
    draws |= {} if drop is None else {"drop": drop}
    mask = torch.randint(0, K, (size, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return LabeledImageData(condition=MaskCondition(mask, K), draws=draws)


def test_every_class_is_dropped_at_the_same_rate() -> None:
    """Where the model drops (no `p_cond`): 20,000 masks of one class each; 3.5 sigma of a binomial is 0.02."""
    model, seen = diffusion(drop_condition=0.2).train(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].mask[:, 0, 0]))
    size = 500
    for i in range(40):
        inputs = batch(size, i, drop=torch.rand(size))
        inputs.condition = MaskCondition((torch.arange(size) % K)[:, None, None].expand(-1, 32, 32), K)
        model.backbone.forward = lambda x, *_: x  # type: ignore[method-assign]
        model(Stage1Encodings(torch.zeros(size, *LATENT)), inputs)
    got, was = torch.cat(seen), (torch.arange(size) % K).repeat(40)
    for k in range(K):
        rate = (got[was == k] == K).float().mean()
        assert abs(rate - 0.2) < 0.02, (k, rate)
    assert ((got == was) | (got == K)).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_p2_weights(gamma: float) -> None:
    """(k + SNR)^-gamma of alpha_bar as it is written in the original: gamma 0 is weight 1 at every time, 0 included."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha_bar = VP("cosine").alpha(t).square()
    weights = P2(gamma=gamma, k=1.0)(VP("cosine"), t)
    assert torch.allclose(weights, (1 / (1 - alpha_bar)) ** -gamma, rtol=1e-12)
    assert (weights == 1).all() == (gamma == 0)
    with pytest.raises(BadInput, match="weighting: expected gamma >= 0 and k > 0"):
        P2(k=0.0)


def test_weighted_losses_are_the_written_sums() -> None:
    """Class weights by their share at each latent position, times P2 of the sample's time, in float64."""
    class_weights = [0.5, 1.0, 2.0, 4.0, 8.0]
    model = diffusion(weighting=P2(gamma=1.0), class_weighted_loss=class_weights).double()
    inputs = batch(3).to("cpu", torch.float64)
    inputs.condition.mask[0, :8] = K  # type: ignore[union-attr]
    zs = Stage1Encodings(torch.randn(3, *LATENT, dtype=torch.float64))
    output = model(zs, inputs)
    losses = model.compute_loss(zs, output, inputs)
    assert output.additional_attr is not None
    error = (output.zs_pred - output.additional_attr["target"]).square()
    per_pixel = torch.tensor([*class_weights, 1.0], dtype=torch.float64)[inputs.condition.mask]  # type: ignore[union-attr]
    weight = per_pixel.unflatten(1, (8, 4)).unflatten(3, (8, 4)).mean((2, 4))
    snr = 1 / torch.tan(torch.pi / 2 * output.additional_attr["t"]).square()
    expected = (error * weight[:, None]).mean((1, 2, 3)) / (1 + snr)
    assert losses.per_sample is not None
    assert torch.allclose(losses.per_sample, expected, rtol=1e-10)
    with pytest.raises(BadInput, match=r"class_weighted_loss: expected 5 numbers >= 0 \(mask classes\)"):
        diffusion(class_weighted_loss=[1.0])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_objectives_have_the_targets_of_the_original(prediction: str) -> None:
    """v = sqrt(ab) eps - sqrt(1 - ab) x0."""
    model = diffusion(prediction=prediction, sampler=Sampler(start=0.999))
    inputs, zs = batch(2), Stage1Encodings(torch.randn(2, *LATENT))
    output = model(zs, inputs)
    assert output.additional_attr is not None
    assert inputs.draws is not None
    ab, noise = torch.cos(torch.pi / 2 * inputs.draws["t"]).square()[:, None, None, None], inputs.draws["noise"]
    targets = {"eps": noise, "x0": zs.zs, "v": ab.sqrt() * noise - (1 - ab).sqrt() * zs.zs}
    assert torch.allclose(output.additional_attr["target"], targets[prediction], atol=1e-6)


def test_the_latent_scale_has_an_exact_inverse() -> None:
    """Encode, scale, back, decode is encode, decode: the original was off by 1 / 0.18215 = 5.5 units.

    In fp32 the latent comes back within its last digit, which a decoder of random weights may enlarge; in fp64 what is
    decoded is the same to 1e-12.
    """
    torch.manual_seed(0)
    vae = UntrainedAutoencoderKL(block_out_channels=[8, 16, 16, 16], layers_per_block=1, norm_groups=4).eval()
    connector = ScaleShift(mean=[0.0] * 4, std=[1 / 0.18215] * 4)
    connector.latent_shape((4, 4, 4))
    inputs = LabeledImageData(img=torch.rand(4, 3, 32, 32), draws={"posterior": torch.randn(4, 4, 4, 4)})
    for dtype, close in ((torch.float32, 4e-6), (torch.float64, 1e-12)):
        vae.to(dtype)
        with torch.no_grad():
            encodings = vae.encode(inputs.to("cpu", dtype))
            scaled = connector(encodings)
            back = connector.reverse(scaled)
            difference = (vae.decode(back).xs_recon - vae.decode(encodings).xs_recon).abs()
        assert (scaled.zs - encodings.zs * 0.18215).abs().max() < 1e-6
        assert (back.zs - encodings.zs).abs().max() < min(close, 1e-6)
        assert difference.max() < close
        assert difference.mean() < 1e-6


def test_one_cycle_has_the_rates_of_the_original() -> None:
    """Peak 1e-4; a run of 2 steps skips the way up (8.1e-5, 4e-10), one of 1,000 begins at 4e-6 and peaks at 30 %."""

    def rates(steps: int) -> list[float]:
        clock = Clock(4, 1)
        clock.total_steps = steps
        return [1e-4 * OneCycle().factor(k, clock) for k in range(steps)]

    assert [f"{rate:.1e}" for rate in rates(2)] == ["8.1e-05", "4.0e-10"]
    long = rates(1000)
    assert long[0] == pytest.approx(4e-6)
    assert long[-1] == pytest.approx(4e-10)
    assert max(long) == long[299] == pytest.approx(1e-4)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=1000)
    for k in range(1000):
        assert long[k] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step(), schedule.step()


def test_ema_every_10_steps_with_warm_up() -> None:
    """Against the sum written out: updates after steps 10, 20, ..., whose decay is min(0.995, (1 + n) / (10 + n))."""
    module = nn.Linear(1, 1, bias=False).double()
    ema = EMA(module, 0.995, warmup=True, every=10)
    expected = module.weight.item()
    for step in range(100):
        with torch.no_grad():
            module.weight.fill_(step + 1.0)
        ema.update(step)
        if (step + 1) % 10 == 0:
            n = step // 10
            decay = min(0.995, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * (step + 1)
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LegacyUNet(LATENT, DataSpec((3, 32, 32))), "expected data of masks for LegacyUNet, got none"),
        (lambda: LegacyUNet(LATENT, SPEC, width=10, norm_groups=4), "norm_groups: expected a divisor of 10 channels"),
        (lambda: LegacyUNet((4, 6, 6), SPEC), "6"),
        (
            lambda: UNet((4, 12, 12), SPEC, width=8, multipliers=[1], attention=[], norm_groups=4),
            "expected a latent whose",
        ),
    ],
)
def test_sizes_that_do_not_fit(make: Make, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make()


def test_another_condition_is_refused() -> None:
    model = moved(BACKBONES["unet"])
    with pytest.raises(BadInput, match="expected MaskCondition of 5 classes, got MaskCondition of 4 classes"):
        model(torch.zeros(1, *LATENT), torch.zeros(1), MaskCondition(torch.zeros(1, 32, 32, dtype=torch.int64), 4))
