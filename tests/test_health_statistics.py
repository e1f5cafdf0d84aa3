"""The statistics of the health checks against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rqvae.health.statistics import (
    binomial_p,
    block_size,
    blocks,
    chi_square_p,
    local_noise,
    lowest_level,
    mann_kendall,
    smooth,
)


@pytest.mark.parametrize("ties", [False, True])
def test_mann_kendall_is_kendalls_tau_against_time(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for trend in (0.0, 0.05, -0.2):
        values = rng.standard_normal(60) + trend * np.arange(60)
        values = np.round(values) if ties else values
        expected = stats.kendalltau(np.arange(60), values, method="asymptotic").pvalue
        ours = 2 * stats.norm.sf(abs(mann_kendall(values)))
        assert ours == pytest.approx(expected, rel=0.15, abs=1e-12)  # ours has the correction for continuity


def test_binomial_is_scipys_exact_test() -> None:
    for hits, draws, share in ((5, 12, 0.364), (0, 40, 0.5), (40, 40, 0.5), (17, 60, 0.25), (3, 8, 0.375)):
        assert binomial_p(hits, draws, share) == pytest.approx(stats.binomtest(hits, draws, share).pvalue, rel=1e-9)
    assert binomial_p(0, 9, 0.0) == 1.0
    assert binomial_p(1, 9, 0.0) == 0.0


def test_chi_square_is_scipys_within_its_approximation() -> None:
    for observed in ([30, 20, 25, 25], [60, 10, 20, 10], [26, 24, 25, 25]):
        expected = stats.chisquare(observed).pvalue
        assert chi_square_p(np.array(observed, float), np.full(4, 25.0)) == pytest.approx(expected, rel=0.1, abs=1e-9)


def test_noise_about_a_moving_level_is_that_of_the_noise() -> None:
    rng = np.random.default_rng(2)
    noise = 0.3 * rng.standard_normal(20000)
    assert local_noise(noise + np.linspace(0, 50, 20000)) == pytest.approx(0.3, rel=0.03)


def test_blocks_are_as_sure_as_they_say() -> None:
    rng = np.random.default_rng(3)
    found = blocks(1 + 0.1 * rng.standard_normal(5000))
    assert np.std(found.levels) == pytest.approx(found.noise, rel=0.15)
    assert found.noise < 0.03
    assert found.starts[-1] + found.size == 5000
    assert block_size(np.ones(5000)) == 25


def test_a_longer_window_is_less_biased_by_noise() -> None:
    rng = np.random.default_rng(4)
    lows = [[lowest_level(1 + 0.05 * rng.standard_normal(100), w) for _ in range(50)] for w in (1, 5, 20)]
    single, five, twenty = (np.mean(low) for low in lows)
    assert single < five < twenty < 1.0
    assert twenty > 0.97


def test_smoothing_keeps_a_line_and_its_length() -> None:
    line = np.linspace(0, 1, 101)
    np.testing.assert_allclose(smooth(line, 11)[10:-10], line[10:-10], atol=1e-12)
    assert len(smooth(line, 11)) == 101
