"""Numbers from noisy samples: medians, spreads, paired ratios, and intervals by the bootstrap. numpy alone; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autokernel.records import Speedup

_NUM_RESAMPLES = 4000
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAST_SIGMA = 0.005  # of the median: steadier than this is luck, not a narrower machine


def median_and_spread(samples: ArrayLike) -> tuple[float, float]:
    """Median and interquartile range, in the samples' unit.

    Raises:
        ValueError: there are no samples.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("the median of no samples is undefined; take at least one")
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float(high - low)


def drifted(times: ArrayLike, *, window: int = 9, num_sigmas: float = 3.0) -> NDArray[np.bool_]:
    """Which rounds to discard because the baseline itself was off.

    The running median is taken over `window` rounds centred on each round (fewer at the ends). A round drifted when it
    lies more than `num_sigmas` robust sigmas from it: sigma is 1.4826 times the median absolute residual, but at least
    0.5 % of the overall median.

    Args:
        times: the baseline's time per round, in order.
    """
    values = np.asarray(times, dtype=np.float64)
    residuals = np.abs(values - running_median(values, window))
    sigma = max(_MAD_TO_SIGMA * float(np.median(residuals)), _LEAST_SIGMA * float(np.median(values)))
    return residuals > num_sigmas * sigma


def running_median(times: ArrayLike, window: int = 9) -> NDArray[np.float64]:
    """Median over `window` values centred on each (fewer at the ends)."""
    values = np.asarray(times, dtype=np.float64)
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(values.size)])


def paired_speedup(
    baseline: ArrayLike, contender: ArrayLike, *, seed: int, num_discarded: int = 0, confidence: float = 0.95
) -> Speedup:
    """Median of the per-round ratios baseline/contender (above 1: the contender is faster) with a bootstrap interval.

    Args:
        baseline: time per round.
        contender: time per round, of the same rounds.
        seed: of the resampling.
        num_discarded: rounds already left out, for the record.

    Raises:
        ValueError: the rounds differ in number, or there are none.
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(contender, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"paired times must be as many on both sides and at least one, not {first.shape} and {second.shape}")
    ratios = first / second
    resampled = np.median(ratios[_resamples(ratios.size, seed)], axis=1)
    ratio = float(np.median(ratios))
    low, high = _interval(resampled, confidence)
    return Speedup(
        ratio=ratio,
        low=min(low, ratio),
        high=max(high, ratio),
        num_rounds=ratios.size,
        num_discarded=num_discarded,
        confidence=confidence,
    )


def paired_relative_difference(
    stock: Sequence[float], other: Sequence[float], *, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """How much larger the mean of `other` is, relative to that of `stock`, with a bootstrap interval over the pairs.

    Args:
        stock: metric per sample (window of text, item of a task).
        other: the same samples' metric with the bundle.

    Returns:
        (difference, low, high), e.g. 0.01 for 1 % larger.

    Raises:
        ValueError: the samples differ in number, there are none, or the stock mean is zero.
    """
    first, second = np.asarray(stock, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"paired samples must be as many on both sides and at least one, not {first.shape} and {second.shape}")
    if first.mean() == 0:
        raise ValueError("a difference relative to a stock mean of 0 is undefined; give a metric that is not centred on 0")
    picks = _resamples(first.size, seed)
    scale = np.abs(first[picks].mean(axis=1))
    differences = (second - first)[picks].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(differences == 0, 0.0, differences / scale)
    mean = float((second - first).mean() / abs(first.mean()))
    low, high = _interval(relative, confidence)
    return mean, min(low, mean), max(high, mean)


def _resamples(size: int, seed: int) -> NDArray[np.int64]:
    """Indices [resample, size], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, size, size=(_NUM_RESAMPLES, size))


def _interval(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)
