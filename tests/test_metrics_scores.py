"""IS, precision and recall, KID, jackknife, MS-SSIM, LPIPS against their packages, exact examples and known truths."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import lpips
import numpy as np
import prdc
import pytest
import pytorch_msssim
import torch
import torchvision
from skimage import data
from torch_fidelity import metric_isc, metric_kid, metric_prc

from rqvae.errors import BadInput
from rqvae.metrics.frechet import frechet_distance, frechet_samples
from rqvae.metrics.inception_score import InceptionScore
from rqvae.metrics.jackknife import GroupedStatistics, fd_infinity, jackknife_features, jackknife_frechet
from rqvae.metrics.kid import kernel_distance, squared_mmd
from rqvae.metrics.ms_ssim import ms_ssim
from rqvae.metrics.perceptual import LPIPSScore
from rqvae.metrics.precision_recall import precision_recall
from rqvae.metrics.statistics import StreamingStatistics

REAL = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [3, 0], [3, 3]]).double()
FAKE = torch.tensor([[0, 0.5], [0.5, 0], [2, 0], [3, 1], [5, 5], [6, 5]]).double()


def relu_features(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=generator) + shift).relu()


def score(logits: torch.Tensor, scorer: InceptionScore) -> tuple[float, float]:
    for positions in torch.arange(len(logits)).split(77):
        scorer.update(logits[positions], positions)
    return scorer.result()


def test_inception_score_equals_torch_fidelity() -> None:
    logits = 3 * torch.randn(997, 1008, generator=torch.Generator().manual_seed(0))
    theirs = metric_isc.isc_features_to_metric(logits, splits=10, rng_seed=2020)
    mean, deviation = score(logits, InceptionScore.shuffled(997))
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_in_closed_form_and_the_trap_of_sorted_files() -> None:
    """Certain predictions of c classes, each as often: c. In files sorted by class a split has one class: 1."""
    logits = 500 * torch.eye(20).repeat_interleave(10, 0)
    assert score(logits, InceptionScore.shuffled(200, splits=1, classes=20))[0] == pytest.approx(20)
    assert score(logits, InceptionScore.in_file_order(200, size=10, classes=20))[0] == pytest.approx(1)
    assert InceptionScore.in_file_order(12_000, classes=2).split_of.bincount().tolist() == [5000, 5000, 2000]


def test_ranks_of_the_inception_score_add_up() -> None:
    logits = 3 * torch.randn(101, 30, generator=torch.Generator().manual_seed(0))
    ranks = [InceptionScore.shuffled(101, 5, classes=30) for _ in range(4)]
    for r, rank in enumerate(ranks):
        rank.update(logits[r::4], torch.arange(101)[r::4])
    with pytest.raises(BadInput, match="expected 101 images, got 26"):
        ranks[0].result()
    ranks[0].replace(sum(rank.state() for rank in ranks))
    alone = score(logits, InceptionScore.shuffled(101, 5, classes=30))
    assert ranks[0].result() == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("k", "le", "lt"),
    [
        (1, (5 / 6, 5 / 6), (4 / 6, 4 / 6, 7 / 6, 5 / 6)),
        (2, (5 / 6, 1), (5 / 6, 1, 2 / 3, 5 / 6)),
        (3, (1, 1), (5 / 6, 1, 5 / 6, 1)),
        (4, (1, 1), (5 / 6, 1, 5 / 6, 1)),
    ],
)
def test_precision_and_recall_of_an_example_by_hand(k: int, le: tuple, lt: tuple) -> None:
    expected = dict(zip(("precision_le", "recall_le"), le, strict=True))
    expected |= dict(zip(("precision_lt", "recall_lt", "density_lt", "coverage_lt"), lt, strict=True))
    for tile in (4, 6):
        ours = precision_recall(REAL + 4, FAKE + 4, k, "float64", tile)
        assert ours == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_equal_prdc_and_torch_fidelity() -> None:
    real, fake = relu_features(300, 64, 0), relu_features(400, 64, 1, 0.1)
    ours = precision_recall(real, fake, 5, "float64", tile=128)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    assert {f"{k}_lt": v for k, v in theirs.items()} == pytest.approx(
        {k: ours[k] for k in ours if "_lt" in k}, abs=1e-4
    )
    precision, recall = metric_prc.calculate_precision_recall_full(fake, real, 5)
    assert (ours["precision_le"], ours["recall_le"]) == pytest.approx((precision, recall), abs=1e-4)
    assert 0.05 < ours["precision_lt"] < 0.999, "an example where the scores say something"
    assert precision_recall(real, fake, 5, "float32") == pytest.approx(ours, abs=1e-3)


def test_half_precision_of_the_adm_suite() -> None:
    """NumPy's float16, operation by operation."""
    real, fake = relu_features(60, 2048, 0), relu_features(70, 2048, 1, 0.02)

    def distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        x, y = a.numpy().astype(np.float16), b.numpy().astype(np.float16)
        norms = [(z * z).astype(np.float32).sum(1).astype(np.float16) for z in (x, y)]
        product = (x.astype(np.float32) @ y.astype(np.float32).T).astype(np.float16)
        return np.maximum(norms[0][:, None] - np.float16(2) * product + norms[1], 0)

    radii = [np.sort(distances(x, x), 1)[:, 3] for x in (real, fake)]
    cross = distances(real, fake)
    ours = precision_recall(real, fake, 3, "adm_fp16")
    assert ours["precision_le"] == pytest.approx((cross <= radii[0][:, None]).any(0).mean(), abs=1e-12)
    assert ours["recall_le"] == pytest.approx((cross <= radii[1]).any(1).mean(), abs=1e-12)
    large = precision_recall(300 * real, 300 * fake, 3, "adm_fp16")  # overflows float16: float32 for the block
    assert large == pytest.approx(precision_recall(real, fake, 3, "float32"), abs=1e-9)


def test_duplicates_are_in_closed_balls_only() -> None:
    twice = torch.tensor([[0.0, 0], [5, 5]]).repeat_interleave(3, 0)
    ours = precision_recall(twice, twice, 2, "float64")
    assert ours == {k: float(k.endswith("_le")) for k in ours}


def test_kid_equals_torch_fidelity_and_an_exact_value() -> None:
    assert squared_mmd(REAL[:4], FAKE[:4]) == pytest.approx(4.971354166666666, rel=1e-14)
    assert squared_mmd(REAL, FAKE, tile=4) == pytest.approx(squared_mmd(REAL, FAKE), rel=1e-13)
    x, y = relu_features(300, 64, 0), relu_features(280, 64, 1, 0.1)
    theirs = metric_kid.kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=100, verbose=False
    )
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    ours = kernel_distance(x, y, subsets=7, size=100)
    assert (np.random.get_state()[1] == state).all(), "the global generator is not ours"
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.subset_deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def reference_and_truth(dim: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A normal distribution, and its distance to the standard one in closed form."""
    mu, variances = np.full(dim, 0.05), np.linspace(0.8, 1.3, dim)
    truth = (mu**2).sum() + ((variances**0.5 - 1) ** 2).sum()
    return mu, np.diag(variances), float(truth)


def test_the_jackknife_interval_covers_the_truth() -> None:
    dim, n, repeats = 8, 500, 60
    mu, cov, truth = reference_and_truth(dim)
    covered, errors, corrected = 0, [], []
    for repeat in range(repeats):
        rows = np.random.default_rng(repeat).normal(size=(n, dim))
        groups = GroupedStatistics(dim, groups=20, seed=repeat)
        groups.update(rows, torch.arange(n))
        result = jackknife_frechet(groups.parts, mu, cov)
        assert result.estimate == pytest.approx(frechet_distance(rows.mean(0), np.cov(rows.T), mu, cov), rel=1e-9)
        covered += result.low <= truth <= result.high
        errors.append(result.standard_error)
        corrected.append(result.bias_corrected)
    assert covered >= 0.9 * repeats
    assert np.mean(errors) == pytest.approx(np.std(corrected, ddof=1), rel=0.3)
    assert abs(np.mean(corrected) - truth) < 4 * np.std(corrected) / repeats**0.5


def test_jackknife_of_few_samples_is_that_of_their_statistics() -> None:
    """Fewer samples than features: the same groups and numbers without a covariance of the samples."""
    rows, reference = relu_features(90, 64, 0).double(), relu_features(400, 64, 1, 0.1).double()
    mu, cov = reference.mean(0), reference.T.cov()
    groups = GroupedStatistics(64, groups=10, seed=3)
    groups.update(rows[:60], torch.arange(60))
    expected = jackknife_frechet(groups.parts, mu, cov)
    ours = jackknife_features(rows[:60], lambda x: frechet_samples(x, mu, cov).value, groups=10, seed=3)
    assert vars(ours) == pytest.approx(vars(expected), rel=1e-7)
    assert ours.low < ours.bias_corrected < ours.high < ours.estimate
    with pytest.raises(BadInput, match="expected 2 to 30 groups of 60 samples, got 31"):
        jackknife_features(rows[:60], lambda x: 0.0, groups=31)


def test_groups_do_not_depend_on_ranks_and_are_balanced() -> None:
    rows = relu_features(403, 5, 0)
    one, two = GroupedStatistics(5, 20), [GroupedStatistics(5, 20) for _ in range(2)]
    one.update(rows, torch.arange(403))
    for r, part in enumerate(two):
        part.update(rows[r::2], torch.arange(403)[r::2])
    assert {part.n for part in one.parts} <= {20, 21}
    for whole, a, b in zip(one.parts, two[0].parts, two[1].parts, strict=True):
        torch.testing.assert_close(whole.cov, a.merge(b).cov, rtol=0, atol=1e-12)


def test_extrapolation_finds_the_distance_of_endless_samples() -> None:
    mu, cov, truth = reference_and_truth(16)
    rows = np.random.default_rng(0).normal(size=(20_000, 16))
    result = fd_infinity(rows, mu, cov)
    assert result.sizes[0] == 2000
    assert result.sizes[-1] == 20_000
    assert result.values[0] - truth > 0.02
    assert abs(result.infinity - truth) < 0.01, "what 20000 samples leave open"
    assert fd_infinity(rows, mu, cov) == result


def photo_pair(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.from_numpy(data.astronaut()[:side, 100 : 100 + side].copy()).permute(2, 0, 1)[None]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return image / 255, ((image + 20 * noise).clamp(0, 255).round() / 255).float()


@pytest.mark.parametrize("side", [176, 256])
def test_ms_ssim_equals_its_package(side: int) -> None:
    image, other = photo_pair(side)
    theirs = pytorch_msssim.ms_ssim(other.double(), image.double(), data_range=1.0, size_average=False)
    torch.testing.assert_close(ms_ssim(other, image), theirs, rtol=0, atol=1e-5)  # its window is float32
    assert 0.5 < float(theirs) < 0.99
    with pytest.raises(BadInput, match="sides >= 176"):
        ms_ssim(other[..., :160], image[..., :160])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("net", "trunk_name"), [("alex", "alexnet"), pytest.param("vgg", "vgg16", marks=pytest.mark.slow)]
)
def test_lpips_equals_its_package_on_8_bit_images(net: str, trunk_name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = getattr(torchvision.models, trunk_name)(weights=None).features.state_dict()
    own = list(features.values())
    torch.save({f"features.{key}": value for key, value in features.items()}, tmp_path / "trunk.pth")
    reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for parameter, value in zip(reference.net.parameters(), own, strict=True):
        parameter.data.copy_(value)
    image, other = photo_pair(64)
    expected = reference(2 * other - 1, 2 * image - 1).flatten()
    ours = LPIPSScore(net=net, trunk_weights=str(tmp_path / "trunk.pth")).load()
    torch.testing.assert_close(ours(other + 0.3 / 255, image), expected.detach(), rtol=1e-5, atol=0)
    assert ours.key == f"lpips_{net}_v0.1_u8"
    with pytest.raises(BadInput, match="no such file"):
        LPIPSScore(trunk_weights=str(tmp_path / "none.pth")).load()


def test_bad_input_is_one_line() -> None:
    scorer = InceptionScore.shuffled(10, classes=3)
    empty = StreamingStatistics(2)
    cases = [
        (lambda: InceptionScore.shuffled(9), "at least 10 images for 10 splits, got 9"),
        (lambda: scorer.update(torch.full((1, 3), torch.nan), torch.zeros(1, dtype=torch.int64)), "logits: .*finite"),
        (lambda: scorer.update(torch.zeros(2, 4), torch.arange(2)), r"expected \(2, 3\), got \(2, 4\)"),
        (lambda: scorer.update(torch.zeros(1, 3), torch.tensor([10])), "positions: expected 0 to 9, got up to 10"),
        (lambda: precision_recall(REAL[:3], FAKE, 3), r"real: .*N > k = 3"),
        (lambda: precision_recall(REAL, FAKE * torch.nan), "generated: expected finite"),
        (lambda: kernel_distance(REAL, FAKE), "subsets of 2 to 6"),
        (lambda: jackknife_frechet([empty, empty], None, None), "groups with images"),
        (lambda: fd_infinity(REAL, None, None), "at least 20 features"),
    ]
    for call, message in cases:
        with pytest.raises(BadInput, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
