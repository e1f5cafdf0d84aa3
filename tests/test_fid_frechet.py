"""Fréchet distance against pytorch-fid, torch-fidelity, clean-fid, closed forms and the nuclear norm of the samples."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from cleanfid import fid as clean_fid
from pytorch_fid import fid_score as pytorch_fid
from torch_fidelity import metric_fid as torch_fidelity

from rqvae.errors import BadInput
from rqvae.metrics.frechet import (
    frechet,
    frechet_distance,
    frechet_distance_features,
    frechet_features,
    frechet_samples,
)
from rqvae.metrics.statistics import StreamingStatistics

DIM = 48


def samples(n: int, seed: int, dim: int = DIM, offset: float = 0.0) -> np.ndarray:
    """ReLU features with correlations, as pooled features have them."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dim, dim)) / dim**0.5 + np.diag(np.linspace(0.2, 2, dim))
    return np.maximum(rng.normal(size=(n, dim)) @ mix + 0.3 + 0.02 * seed, 0) + offset


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


def nuclear(x: np.ndarray, y: np.ndarray) -> float:
    """The same trace as a nuclear norm of centred samples: no covariance, no eigenvalue, no square root of one."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace)


def peers(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The distance of two sets of features by each peer's own function; SciPy < 1.18."""
    (mu1, s1), (mu2, s2) = moments(x), moments(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return {
            "pytorch-fid": float(pytorch_fid.calculate_frechet_distance(mu1, s1, mu2, s2)),
            "clean-fid": float(clean_fid.frechet_distance(mu1, s1, mu2, s2)),
            "torch-fidelity": float(
                next(
                    iter(
                        torch_fidelity.fid_statistics_to_metric(
                            {"mu": mu1, "sigma": s1}, {"mu": mu2, "sigma": s2}, False
                        ).values()
                    )
                )
            ),
        }


def test_equals_the_code_of_pytorch_fid_torch_fidelity_and_clean_fid() -> None:
    x, y = samples(400, 1), samples(500, 2)
    ours = frechet(*moments(x), *moments(y))
    assert ours.route == "cholesky_1"
    for name, theirs in peers(x, y).items():
        assert ours.value == pytest.approx(theirs, rel=1e-9), name


@pytest.mark.parametrize("dim", [1, 255, 256, 257, 600])
def test_blocks_of_the_triangular_product(dim: int) -> None:
    """At, below and above the width of a block, against samples whose covariances are of full rank."""
    x, y = samples(dim + 60, 1, dim), samples(dim + 90, 2, dim)
    ours = (
        frechet(*moments(x), *moments(y))
        if dim > 1
        else frechet(x.mean(0), np.var(x, ddof=1, axis=0)[None], y.mean(0), np.var(y, ddof=1, axis=0)[None])
    )
    assert ours.route == "cholesky_1"
    assert ours.value == pytest.approx(nuclear(x, y), rel=1e-9)


@pytest.mark.parametrize("size", [1e-15, 1e-12, 1e-9])
def test_what_is_not_quite_symmetric_is_averaged(size: float) -> None:
    (mu1, s1), (mu2, s2) = moments(samples(400, 1)), moments(samples(500, 2))
    noise = np.random.default_rng(0).normal(size=s1.shape) * size * np.abs(s1).max()
    expected = frechet(mu1, s1 + (noise + noise.T) / 2, mu2, s2).value
    assert frechet(mu1, s1 + noise, mu2, s2).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("n1", "n2", "route", "rank"),
    [
        (400, 500, "cholesky_1", DIM), (DIM, 500, "eigh_1", DIM - 1), (500, 20, "eigh_2", 19),
        (20, 30, "eigh_1", 19), (30, 20, "eigh_2", 19), (2, 500, "eigh_1", 1),
    ],
)  # fmt: skip
def test_equals_the_nuclear_norm(n1: int, n2: int, route: str, rank: int) -> None:
    x, y = samples(n1, 1), samples(n2, 2)
    result = frechet(*moments(x), *moments(y))
    assert (result.route, result.rank) == (route, rank)
    assert result.value == pytest.approx(nuclear(x, y), rel=1e-8)
    assert result.value == pytest.approx(result.mean_term + result.covariance_term)
    assert frechet_distance_features(x, y) == pytest.approx(nuclear(x, y), rel=1e-10)
    assert frechet_distance_features(y, x) == pytest.approx(frechet_distance_features(x, y), rel=1e-10)


def test_product_routes_of_others_are_low_where_a_covariance_is_deficient() -> None:
    """What we do not copy; the error grows with the number of missing dimensions."""
    x, y = samples(60, 1, 256), samples(70, 2, 256)
    exact = nuclear(x, y)
    for name, theirs in peers(x, y).items():
        assert theirs - exact < -1e-6, name
    assert abs(frechet_distance(*moments(x), *moments(y)) - exact) < 1e-9 * exact


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_product_routes_are_low_by_more_than_a_ten_thousandth_at_2048_features() -> None:
    """Variances that fall off as 1 / k, as those of pooled features do; 1000 samples against 1000."""
    mix = np.random.default_rng(99).normal(size=(2048, 2048)) / 2 * np.arange(1, 2049)[:, None] ** -0.5
    x, y = (np.maximum(np.random.default_rng(s).normal(size=(1000, 2048)) @ mix + 0.02 * s, 0) for s in (1, 2))
    exact = nuclear(x, y)
    for name, theirs in peers(x, y).items():
        assert theirs - exact < -1.5e-4, name
    a, b = moments(x), moments(y)
    assert frechet_distance(*a, *b) == pytest.approx(exact, rel=1e-8)
    assert frechet_distance_features(x, y) == pytest.approx(exact, rel=1e-10)
    for itself in (frechet_distance(*a, *a), frechet_distance_features(x, x), frechet_samples(x, *a).value):
        assert abs(itself) < 1e-9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_equals_the_code_of_others_at_2048_features() -> None:
    """Of full rank, as 50 000 images are; a distance to itself is 0."""
    x, y = samples(2500, 1, 2048), samples(2600, 2, 2048)
    a, b = moments(x), moments(y)
    ours = frechet(*a, *b)
    assert ours.route == "cholesky_1"
    for name, theirs in peers(x, y).items():
        assert ours.value == pytest.approx(theirs, rel=1e-9), name
    assert abs(frechet_distance(*a, *a)) < 1e-9


@pytest.mark.parametrize(("n", "of_reference"), [(20, 500), (20, 30), (30, 20), (DIM, 500), (2, 20), (400, 500)])
def test_few_samples_against_stored_statistics(n: int, of_reference: int) -> None:
    """The samples are the factor; the reference, whose features nobody has, may be of full rank or not."""
    x, y = samples(n, 1), samples(of_reference, 2)
    result = frechet_samples(x, *moments(y))
    assert result.value == pytest.approx(nuclear(x, y), rel=1e-10)
    assert result.route == ("gram_1" if n <= DIM else "cholesky_1")
    for bad, message in ((x[:1], "N >= 2"), (x[:, :9], r"expected \(N, 48\)"), (x * np.nan, "x: expected finite")):
        with pytest.raises(BadInput, match=message):
            frechet_samples(bad, *moments(y))


def test_closed_form_of_diagonal_covariances() -> None:
    a, b = torch.linspace(0.1, 3, 7), torch.linspace(2, 0.5, 7)
    expected = float((a.double().sqrt() - b.double().sqrt()).square().sum() + 7 * 4)
    for dtype in (torch.float64, torch.float32, torch.float16):
        mu = torch.zeros(7, dtype=dtype)
        got = frechet_distance(mu, torch.diag(a).to(dtype), mu + 2, torch.diag(b).to(dtype))
        assert got == pytest.approx(expected, rel=1e-2 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("n", [2, 20, DIM, 400])
def test_distance_to_itself_is_zero(n: int) -> None:
    x = samples(n, 3)
    assert abs(frechet_distance(*moments(x), *moments(x))) < 1e-9
    assert abs(frechet_distance_features(x, x)) < 1e-9


def test_channels_that_never_fire() -> None:
    x, y = samples(400, 1), samples(500, 2)
    x[:, 5], y[:, 9] = 0.0, 0.0
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(nuclear(x, y), rel=1e-8)
    zero = np.zeros((DIM, DIM))
    assert frechet_distance(x.mean(0), zero, x.mean(0), zero) == 0.0


def test_one_nan_at_2048_features_raises_in_under_a_second() -> None:
    """SciPy's square root takes minutes for it."""
    mu, cov, features = np.zeros(2048), np.eye(2048), np.zeros((3000, 2048))
    cov[77, 3] = features[2999, 2047] = np.nan
    for call in (lambda: frechet_distance(mu, cov, mu, np.eye(2048)), lambda: frechet_features(features, features)):
        start = time.monotonic()
        with pytest.raises(ValueError, match="expected finite"):
            call()
        assert time.monotonic() - start < 1


def test_bad_input_is_named_at_once() -> None:
    mu, cov = moments(samples(600, 1, 256))
    broken = cov.copy()
    broken[3, 3] = np.nan
    start = time.monotonic()
    with pytest.raises(BadInput, match="cov1: expected finite"):
        frechet_distance(mu, broken, mu, cov)
    assert time.monotonic() - start < 1
    for arguments, message in (
        ((mu[:5], cov, mu, cov), r"cov1: expected \(5, 5\), got \(256, 256\)"),
        ((mu, cov, mu, -cov), "cov2: expected a covariance"),
        ((mu, cov, mu * np.inf, cov), "mu2: expected finite"),
        ((mu, np.triu(cov), mu, cov), "cov1: expected a symmetric"),
        ((cov, cov, mu, cov), r"mu1: expected \(D,\)"),
    ):
        with pytest.raises(BadInput, match=message):
            frechet_distance(*arguments)
    for x, message in ((mu[None], "N >= 2"), (mu, r"\(N, D\)"), (cov[:, :9], r"y: expected \(N, 9\)")):
        with pytest.raises(BadInput, match=message):
            frechet_features(x, cov)


def test_statistics_survive_an_offset() -> None:
    x = samples(5000, 1, 16)
    x = (x - x.mean(0)) + 1e4
    statistics = StreamingStatistics(16)
    for part in np.array_split(x, 37):
        statistics.update(part)
    expected = np.cov((x - 1e4).astype(np.longdouble), rowvar=False)
    assert statistics.n == 5000
    np.testing.assert_allclose(statistics.cov, expected, rtol=1e-8, atol=1e-11)
    exact_mean = [math.fsum(column) / 5000 for column in x.T]  # numpy's own is off by 5e-14 here
    np.testing.assert_allclose(statistics.mean, exact_mean, rtol=1e-15)


def test_parts_add_up_and_can_be_taken_away() -> None:
    x = samples(700, 1, offset=100.0)
    whole = StreamingStatistics(DIM).update(x)
    a, b, c = (
        StreamingStatistics(DIM).update(torch.from_numpy(x[s])) for s in (slice(9), slice(9, 600), slice(600, 700))
    )
    merged = StreamingStatistics(DIM).merge(a).merge(StreamingStatistics(DIM)).merge(b).merge(c)
    assert merged.n == 700
    torch.testing.assert_close(merged.cov, whole.cov, rtol=0, atol=1e-11)
    rest, expected = merged.without(b), np.concatenate([x[:9], x[600:]])
    np.testing.assert_allclose(rest.cov, np.cov(expected, rowvar=False), rtol=0, atol=1e-11)
    np.testing.assert_allclose(rest.mean, expected.mean(0), rtol=1e-13)
    assert a.n == 9


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_reduce_to_one(world: int) -> None:
    """The sums of the ranks, taken in turns as an all-reduce takes them; the first rank has no vector at all."""
    x = samples(301, 1, offset=1e4)
    ranks = [StreamingStatistics(DIM).update(x[r::world]) for r in range(world)]
    if world == 4:
        ranks = [StreamingStatistics(DIM), ranks[0].merge(ranks[1]), *ranks[2:]]
    totals = all_reduce_in_turns(ranks)
    np.testing.assert_allclose(totals.cov, np.cov((x - 1e4), rowvar=False), rtol=0, atol=1e-10)
    np.testing.assert_allclose(totals.mean, x.mean(0), rtol=1e-13)
    with pytest.raises(BadInput, match="expected features of 302 images over all ranks, got 301"):
        totals.reduce(lambda t: t, expected=302)


def all_reduce_in_turns(ranks: list[StreamingStatistics]) -> StreamingStatistics:
    """Run `reduce` of the last rank against recorded messages of the others."""
    first: list[torch.Tensor] = []

    class SentError(Exception):
        pass

    def record(message: torch.Tensor) -> torch.Tensor:
        first.append(message.clone())
        raise SentError

    for rank in ranks:
        with pytest.raises(SentError):
            rank.reduce(record)
    counted, second = sum(first), []

    def record_second(message: torch.Tensor) -> torch.Tensor:
        if message.ndim == 1:
            return counted
        second.append(message.clone())
        raise SentError

    for rank in ranks:
        with pytest.raises(SentError):
            rank.reduce(record_second)
    return ranks[-1].reduce(lambda m: counted if m.ndim == 1 else sum(second))


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    x = samples(301, 1, offset=1e4)
    statistics = StreamingStatistics(DIM).update(x[rank::world]).reduce(all_reduce, expected=301)
    np.savez(f"{folder}/{rank}.npz", mean=statistics.mean.numpy(), cov=statistics.cov.numpy())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_reduce_to_one(world: int, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(r, world, str(tmp_path))) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    one = StreamingStatistics(DIM).update(samples(301, 1, offset=1e4))
    for rank in range(world):
        got = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(got["cov"], one.cov, rtol=0, atol=1e-10)
        np.testing.assert_allclose(got["mean"], one.mean, rtol=1e-14)


def test_statistics_refuse_what_they_cannot_use() -> None:
    statistics = StreamingStatistics(3)
    for rows, message in (
        (torch.zeros(2, 4), r"expected \(N, 3\), got \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "expected floats"),
        (torch.tensor([[0.0, 1, 2], [0, torch.nan, 2]]), "row 1 has NaN"),
    ):
        with pytest.raises(BadInput, match=message):
            statistics.update(rows)
    statistics.update(torch.zeros(0, 3)).update(torch.zeros(1, 3, dtype=torch.bfloat16))
    with pytest.raises(BadInput, match="at least 2 images, got 1"):
        _ = statistics.cov
    with pytest.raises(BadInput, match="3 and 4"):
        statistics.merge(StreamingStatistics(4))
