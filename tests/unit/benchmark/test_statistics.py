"""Percentiles that are samples, intervals that cover, and no number from too few samples."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.benchmark.statistics import (
    bootstrap_median_difference,
    bootstrap_rounds,
    mann_whitney,
    median,
    minimum_samples,
    percentile,
    summarise,
)

LATENCIES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=600)


@pytest.mark.parametrize(("q", "needed"), [(0.5, 8), (0.9, 44), (0.99, 459), (0.999, 4603)])
def test_a_percentile_is_stated_from_its_minimum_count_on_and_not_before(q: float, needed: int) -> None:
    assert minimum_samples(q) == needed
    enough = percentile(np.arange(1.0, needed + 1), q)
    assert (enough.value, enough.low, enough.high) == (math.ceil(q * needed), enough.low, needed)
    short = percentile(np.arange(1.0, needed), q)
    assert short.value is None
    assert short.low is None
    assert short.reason == f"insufficient samples: {needed - 1}, p{q * 100:g} needs {needed}"


def test_three_samples_state_no_percentile_at_all() -> None:
    summary = summarise([1.0, 2.0, 3.0])
    assert [summary.p50.value, summary.p90.value, summary.p99.value, summary.p99_9.value] == [None] * 4
    assert (summary.count, summary.min, summary.max) == (3, 1.0, 3.0)


def test_nearest_rank_on_a_thousand_samples() -> None:
    summary = summarise(np.random.default_rng(0).permutation(np.arange(1.0, 1001)))
    assert (summary.p50.value, summary.p90.value, summary.p99.value) == (500, 900, 990)


@given(LATENCIES, st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_is_a_sample_inside_its_interval(samples: list[float], q: float) -> None:
    stated = percentile(samples, q)
    if stated.value is None:
        assert len(samples) < minimum_samples(q)
        return
    assert stated.low is not None
    assert stated.high is not None
    assert {stated.low, stated.value, stated.high} <= set(samples)
    assert stated.low <= stated.value <= stated.high
    assert sum(sample <= stated.value for sample in samples) >= q * len(samples) - 1e-6


def binomial_below(count: int, q: Fraction) -> list[Fraction]:
    """P(at most k of `count` samples lie below the percentile q), k from 0: exact, term by term."""
    mass = [math.comb(count, k) * q**k * (1 - q) ** (count - k) for k in range(count + 1)]
    return list(itertools.accumulate(mass))


def intervals_by_hand(count: int, q: Fraction, confidence: Fraction) -> list[tuple[int, int]]:
    """Of all pairs of ranks that cover the percentile with the confidence, the narrowest that cover it best."""
    below = binomial_below(count, q)
    pairs = {
        (low, high): below[high - 1] - below[low - 1]
        for low in range(1, count + 1)
        for high in range(low, count + 1)
        if below[high - 1] - below[low - 1] >= confidence
    }
    narrowest = min(high - low for low, high in pairs)
    best = max(coverage for (low, high), coverage in pairs.items() if high - low == narrowest)
    return [pair for pair, coverage in pairs.items() if pair[1] - pair[0] == narrowest and coverage == best]


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 70), st.sampled_from([Fraction(1, 2), Fraction(9, 10)]))
def test_intervals_are_those_of_trying_every_pair_of_ranks(count: int, q: Fraction) -> None:
    if count < minimum_samples(float(q)):
        return
    stated = percentile(np.arange(1.0, count + 1), float(q))
    # ranks that cover equally well are as good as each other
    assert (stated.low, stated.high) in intervals_by_hand(count, q, Fraction(99, 100))


@given(
    st.one_of(
        st.lists(st.floats(0.001, 1000), min_size=8, max_size=300),
        st.lists(st.sampled_from([5.0, 80.0]), min_size=8, max_size=300),
        st.lists(st.floats(0.5, 4).map(lambda x: 10**x), min_size=8, max_size=300),
    ),
    st.sampled_from([Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)]),
)
def test_percentiles_are_the_nearest_rank_of_the_sorted_samples(samples: list[float], q: Fraction) -> None:
    stated = percentile(samples, float(q))
    rank = -(-q.numerator * len(samples) // q.denominator)  # the ceiling, in whole numbers
    wanted = sorted(samples)[rank - 1] if len(samples) >= minimum_samples(float(q)) else None
    assert stated.value == wanted


@pytest.mark.parametrize(("q", "count"), [(0.5, 30), (0.9, 60), (0.99, 500)])
def test_the_interval_covers_the_true_percentile_ninety_nine_times_in_a_hundred(q: float, count: int) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        stated = percentile(rng.random(count), q)
        assert stated.low is not None
        assert stated.high is not None
        covered += stated.low <= q <= stated.high
    assert covered >= 980


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [  # scipy.stats.mannwhitneyu(a, b, method="asymptotic")
        ([1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12], 0.0133130),
        ([1, 1, 2, 2, 3, 3, 3, 4], [1, 2, 2, 3, 4, 4, 4, 4], 0.2775097),
        ([2, 2, 2], [2, 2, 2], 1.0),
    ],
)
def test_mann_whitney_agrees_with_scipy_also_with_ties(a: list[float], b: list[float], p: float) -> None:
    assert mann_whitney(a, b) == pytest.approx(p, abs=1e-6)
    assert mann_whitney(b, a) == pytest.approx(p, abs=1e-6)


def test_the_bootstrap_interval_is_that_of_resampling() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(10, 1, 101), rng.normal(11, 1, 101)
    drawn = np.sort([median(rng.choice(b, 101)) - median(rng.choice(a, 101)) for _ in range(4000)])
    low, high = bootstrap_median_difference(a, b, seed=0)
    assert low == pytest.approx(drawn[20], abs=0.1)
    assert high == pytest.approx(drawn[-20], abs=0.1)
    assert (low, high) == bootstrap_median_difference(a, b, seed=0)


def test_the_interval_of_rounds_holds_what_both_sides_share_against_neither() -> None:
    rng = np.random.default_rng(3)
    shared = np.cumsum(rng.standard_normal(40))
    a, b = shared + 0.01 * rng.standard_normal(40), shared + 1.0 + 0.01 * rng.standard_normal(40)
    low, high = bootstrap_rounds(a, b, seed=0)
    assert 0.95 < low < 1.0 < high < 1.05
    apart_low, apart_high = bootstrap_median_difference(a, b, seed=0)
    assert apart_high - apart_low > 10 * (high - low)


def test_the_interval_of_rounds_is_that_of_the_sides_where_they_share_nothing() -> None:
    a, b = np.random.default_rng(4).standard_normal((2, 200))
    assert bootstrap_rounds(a, b, seed=0) == pytest.approx(bootstrap_median_difference(a, b, seed=0), abs=0.1)
