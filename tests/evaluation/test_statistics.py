"""Averages and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from learnedopt.evaluation import bootstrap, paired_ratio, share_below, summarize
from learnedopt.evaluation.statistics import mean, median


@pytest.fixture
def sample() -> np.ndarray:
    return np.random.default_rng(0).lognormal(size=200)


def test_intervals_agree_with_scipy(sample: np.ndarray) -> None:
    summary = summarize(sample)
    for estimate, statistic in ((summary.mean, np.mean), (summary.median, np.median)):
        theirs = scipy.stats.bootstrap((sample,), statistic, method="percentile", n_resamples=5000, rng=1)
        low, high = theirs.confidence_interval
        width = high - low
        assert estimate.value == pytest.approx(statistic(sample))
        assert estimate.low == pytest.approx(low, abs=0.1 * width)
        assert estimate.high == pytest.approx(high, abs=0.1 * width)


def test_the_interval_of_the_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    estimate = summarize(values).mean
    half = 1.96 * values.std() / math.sqrt(1000)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_are_reproducible_and_depend_on_the_seed(sample: np.ndarray) -> None:
    assert summarize(sample) == summarize(sample)
    assert summarize(sample).mean.low != summarize(sample, seed=1).mean.low


def test_a_diverged_run_is_counted_and_never_dropped() -> None:
    summary = summarize([*range(1, 20), math.inf])
    assert (summary.count, summary.diverged) == (20, 1)
    assert summary.mean.value == summary.mean.high == math.inf
    assert math.isfinite(summary.mean.low)
    assert summary.median.value == 10.5
    assert math.isfinite(summary.median.high)


def test_nan_counts_as_diverged() -> None:
    assert summarize([1.0, math.nan, 3.0]) == summarize([1.0, math.inf, 3.0])


def test_if_all_diverge_everything_is_infinite() -> None:
    summary = summarize([math.inf] * 4)
    assert summary.diverged == 4
    assert {summary.mean.low, summary.mean.value, summary.median.low, summary.median.value} == {math.inf}


def test_pairing_takes_out_what_the_problems_have_in_common(sample: np.ndarray) -> None:
    """Half the loss on every problem is a ratio of one half, however much problems differ."""
    assert paired_ratio(mean, sample / 2, sample).high == pytest.approx(0.5)
    # The median may pick different problems in the two samples, unless they are in the same order.
    assert paired_ratio(median, sample / 2, sample).low == pytest.approx(0.5)
    shuffled = np.random.default_rng(1).permutation(sample)
    unpaired = paired_ratio(mean, sample / 2, shuffled)
    assert unpaired.low < 0.45 < 0.55 < unpaired.high


def test_ratios_with_diverged_runs() -> None:
    finite, diverged = [1.0, 2.0], [1.0, math.inf]
    assert paired_ratio(mean, finite, diverged).value == 0
    assert paired_ratio(mean, diverged, finite).value == math.inf
    assert paired_ratio(mean, diverged, diverged).value == math.inf


def test_share_below_counts_only_strictly_lower_losses() -> None:
    assert share_below([1.0, 2.0, 3.0, math.inf], [2.0, 2.0, math.inf, math.inf]) == 0.5


@pytest.mark.parametrize("samples", [([],), ([1.0], [1.0, 2.0]), ([[1.0]],), ()])
def test_samples_that_are_no_paired_samples_are_rejected(samples: tuple[list[float], ...]) -> None:
    with pytest.raises(ValueError, match="equal length"):
        bootstrap(mean, *samples)
