"""Averages over problems with bootstrap confidence intervals, safe with diverged runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample and the 95 % confidence interval of the population's."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What a set of final losses says."""

    count: int
    diverged: int
    """How many are infinite or NaN."""
    mean: Estimate
    """Infinite as soon as one run has diverged."""
    median: Estimate
    """Infinite once half of the runs have diverged."""


def bootstrap(statistic: Callable[..., Values], *samples: ArrayLike, seed: int = 0) -> Estimate:
    """A statistic of one sample, or of several paired ones, with its percentile bootstrap interval.

    Problems are drawn with replacement, :data:`RESAMPLES` times, the same ones from every sample, so that what paired
    samples have in common cancels. NaN counts as infinite. The interval's ends are values that occurred (no
    interpolation), since nothing lies between a finite number and infinity.

    Args:
        statistic: From arrays ``(..., problems)``, one per sample, to ``(...)``.
        samples: One-dimensional, of equal length.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    >>> bootstrap(lambda x: x.mean(-1), [1.0, 2.0, 3.0]).value
    2.0
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or arrays[0].ndim != 1 or not arrays[0].size or any(a.shape != arrays[0].shape for a in arrays):
        raise ValueError(
            f"samples must be one-dimensional, not empty and of equal length, got shapes {[a.shape for a in arrays]}"
        )
    arrays = [np.where(np.isnan(array), np.inf, array) for array in arrays]
    index = np.random.default_rng(seed).integers(arrays[0].size, size=(RESAMPLES, arrays[0].size))
    low, high = np.quantile(statistic(*(array[index] for array in arrays)), [0.025, 0.975], method="inverted_cdf")
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def mean(values: Values) -> Values:
    """Over the last axis."""
    return np.asarray(values.mean(-1))


def median(values: Values) -> Values:
    """Over the last axis."""
    return np.asarray(np.median(values, axis=-1))


def summarize(values: ArrayLike, seed: int = 0) -> Summary:
    """Mean and median of final losses, their 95 % bootstrap intervals, and the number that diverged.

    >>> summarize([1.0, 2.0, float("inf")]).mean
    Estimate(value=inf, low=1.0, high=inf)
    """
    array = np.asarray(values, dtype=np.float64)
    return Summary(
        count=array.size,
        diverged=int(array.size - np.isfinite(array).sum()),
        mean=bootstrap(mean, array, seed=seed),
        median=bootstrap(median, array, seed=seed),
    )


def paired_ratio(
    statistic: Callable[[Values], Values], values: ArrayLike, baseline: ArrayLike, seed: int = 0
) -> Estimate:
    """How many times the baseline's mean or median, ``statistic(values) / statistic(baseline)``, over paired problems.

    Zero where only the baseline's is infinite, infinite wherever that of ``values`` is.

    >>> paired_ratio(mean, [1.0, 2.0], [2.0, 4.0])
    Estimate(value=0.5, low=0.5, high=0.5)
    """

    def ratio(ours: Values, theirs: Values) -> Values:
        numerator, denominator = statistic(ours), statistic(theirs)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.isinf(numerator), np.inf, numerator / denominator)

    return bootstrap(ratio, values, baseline, seed=seed)


def share_below(values: ArrayLike, baseline: Sequence[float] | ArrayLike) -> float:
    """The share of paired problems on which ``values`` is strictly lower."""
    return float((np.asarray(values) < np.asarray(baseline)).mean())
