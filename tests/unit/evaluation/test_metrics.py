from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.evaluation.metrics import (
    Estimate,
    mean,
    median_of_ratios,
    proportion,
    rank_correlation,
    ratio,
    ratio_of_medians,
)

# Wilson score intervals (95 %), as Newcombe (1998) and R's prop.test(correct = FALSE) give them.
KNOWN = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (10, 10, 0.7225, 1.0000),
    (5, 10, 0.2366, 0.7634),
]


@pytest.mark.parametrize(("hits", "n", "low", "high"), KNOWN)
def test_wilson_interval_has_the_published_values(hits, n, low, high):
    estimate = proportion(hits, n)
    assert estimate.value == hits / n
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=50)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_the_share_and_mirrors(sample):
    hits, n = sample
    estimate, mirror = proportion(hits, n), proportion(n - hits, n)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert (mirror.low, mirror.high) == pytest.approx((1 - estimate.high, 1 - estimate.low))
    assert proportion(2 * hits, 2 * n).high - proportion(2 * hits, 2 * n).low < (
        estimate.high - estimate.low
    )


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (1, 0), (3, -1), (4, 3), (-1, 3)])
def test_what_is_no_proportion_is_refused(hits, n):
    with pytest.raises(ValueError, match="proportion"):
        proportion(hits, n)


@settings(max_examples=40)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 9))
def test_bootstrap_lies_within_the_values_and_depends_on_the_seed_alone(values, seed):
    estimate = mean(values, seed=seed, resamples=200)
    assert estimate == mean(values, seed=seed, resamples=200)
    assert estimate.n == len(values)
    slack = 1e-9 * max(abs(value) for value in values)
    assert min(values) - slack <= estimate.low <= estimate.high <= max(values) + slack


@given(st.floats(-1e6, 1e6), st.integers(1, 9))
@settings(max_examples=20)
def test_equal_values_leave_no_interval(value, n):
    estimate = mean([value] * n, resamples=50)
    assert estimate.low == estimate.high == estimate.value


def test_bootstrap_covers_the_true_mean_about_as_often_as_said():
    import random

    rng = random.Random(0)
    samples = [[rng.gauss(3, 2) for _ in range(40)] for _ in range(150)]
    estimates = [mean(sample, seed=i, resamples=400) for i, sample in enumerate(samples)]
    assert all(e.low <= e.value <= e.high for e in estimates)
    covered = sum(e.low <= 3 <= e.high for e in estimates) / len(estimates)
    assert 0.87 <= covered <= 0.99
    # A normal mean: 1.96 standard errors on either side.
    width = sum(e.high - e.low for e in estimates) / len(estimates)
    assert width == pytest.approx(2 * 1.96 * 2 / 40**0.5, rel=0.08)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        mean([])


def test_results_are_rounded_and_named():
    assert Estimate(1 / 3, 0.1, 2 / 3, 9).as_result("exact") == {
        "name": "exact",
        "value": 0.333333,
        "n": 9,
        "ci95": [0.1, 0.666667],
    }


def test_a_ratio_is_that_of_the_sums_with_an_interval_around_it():
    estimate = ratio([1.0, 2.0, 3.0, 6.0], [2.0, 4.0, 6.0, 8.0])
    assert estimate.value == pytest.approx(0.6)
    assert estimate.low <= 0.6 <= estimate.high
    # Proportional samples leave no doubt.
    sure = ratio([1.0, 2.0, 3.0], [4.0, 8.0, 12.0])
    assert (sure.low, sure.value, sure.high) == pytest.approx((0.25, 0.25, 0.25))


def test_a_ratio_of_medians_does_not_mind_one_disturbed_sample():
    estimate = ratio_of_medians([2.0] * 9 + [900.0], [4.0] * 9 + [1.0])
    assert (estimate.low, estimate.value, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 10)
    assert ratio_of_medians([1.0, 3.0], [2.0, 6.0]).value == 0.5
    unsure = ratio_of_medians([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert 1.0 <= unsure.low < unsure.value < unsure.high <= 4.0


def test_a_median_of_ratios_does_not_mind_a_machine_that_is_slow_for_a_while():
    estimate = median_of_ratios([2.0] * 5 + [20.0] * 4, [4.0] * 5 + [40.0] * 4)
    assert (estimate.low, estimate.value, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 9)
    unsure = median_of_ratios([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert 1.0 <= unsure.low < unsure.value < unsure.high <= 4.0


@pytest.mark.parametrize("of", [ratio, ratio_of_medians, median_of_ratios])
@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_what_is_no_ratio_is_refused(of, above, below):
    with pytest.raises(ValueError, match="ratio"):
        of(above, below)


def test_rank_correlation_has_the_textbook_values():
    assert rank_correlation([1, 2, 3], [10, 20, 900]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Spearman's ρ of these ten pairs is -29/165.
    left = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    right = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert rank_correlation(left, right) == pytest.approx(-29 / 165)
    # Ties share their mean rank.
    assert rank_correlation([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
