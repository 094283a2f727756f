"""Statistics against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from autokernel.evaluate.statistics import (
    drifted,
    median_and_spread,
    paired_relative_difference,
    paired_speedup,
    running_median,
)


def test_median_and_interquartile_range() -> None:
    assert median_and_spread([1, 2, 3, 4, 100]) == (3.0, 2.0)
    with pytest.raises(ValueError, match="no samples"):
        median_and_spread([])


def test_speedup_is_the_median_of_paired_ratios_not_the_ratio_of_medians() -> None:
    baseline, contender = [10.0, 20.0, 90.0], [5.0, 100.0, 45.0]  # twice as fast in two rounds of three
    assert paired_speedup(baseline, contender, seed=0).ratio == 2.0
    assert np.median(baseline) / np.median(contender) < 0.5


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        drift = np.cumsum(rng.normal(0, 0.02, 41))  # common to both sides of a pair
        base = 100 * np.exp(drift + rng.normal(0, 0.03, 41))
        other = 80 * np.exp(drift + rng.normal(0, 0.03, 41))
        speedup = paired_speedup(base, other, seed=seed)
        covered += speedup.low <= 1.25 <= speedup.high
    assert 180 <= covered <= 199


def test_equal_contenders_are_not_faster() -> None:
    rng = np.random.default_rng(1)
    times = rng.lognormal(0, 0.1, (2, 41))
    assert paired_speedup(times[0], times[1], seed=0).low <= 1.02
    assert 1.02 < paired_speedup(times[0], times[0] / 1.5, seed=0).low <= 1.5


def test_a_disturbed_round_does_not_move_the_interval() -> None:
    baseline, contender = np.full(21, 2.0), np.full(21, 1.0)
    baseline[3] = 200.0
    speedup = paired_speedup(baseline, contender, seed=0)
    assert (speedup.low, speedup.ratio, speedup.high) == (2.0, 2.0, 2.0)


def test_same_seed_same_interval() -> None:
    times = np.random.default_rng(2).lognormal(0, 0.1, (2, 21))
    assert paired_speedup(*times, seed=3) == paired_speedup(*times, seed=3)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="as many on both sides"):
        paired_speedup([1.0, 2.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="as many on both sides"):
        paired_relative_difference([1.0, 2.0], [1.0])


def test_drift_finds_the_disturbed_rounds_and_forgives_a_slow_trend() -> None:
    rng = np.random.default_rng(4)
    times = 100 + rng.normal(0, 0.3, 60) + np.linspace(0, 20, 60)
    times[[7, 30, 31]] *= 1.4
    found = set(np.flatnonzero(drifted(times)))
    assert {7, 30, 31} <= found
    assert len(found) <= 8
    assert not drifted([5.0] * 20).any()
    assert not drifted([5.0, 5.05, 5.02]).any()


def test_running_median_shortens_at_the_ends() -> None:
    assert running_median([1, 2, 3, 4, 100], window=3).tolist() == [1.5, 2, 3, 4, 52]


def test_relative_difference_of_paired_metrics() -> None:
    rng = np.random.default_rng(5)
    stock = rng.lognormal(0, 0.5, 64)
    mean, low, high = paired_relative_difference(stock.tolist(), (stock * 1.01).tolist())
    assert mean == pytest.approx(0.01)
    assert low == pytest.approx(0.01)
    assert high == pytest.approx(0.01)  # pairing removes the spread between samples
    noisy = stock + rng.normal(0, 0.05, 64)
    mean, low, high = paired_relative_difference(stock.tolist(), noisy.tolist())
    assert low < 0 < high
    assert low <= mean <= high
    assert paired_relative_difference([2.0, 2.0], [2.0, 2.0]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="stock mean of 0"):
        paired_relative_difference([1.0, -1.0], [1.0, 1.0])
