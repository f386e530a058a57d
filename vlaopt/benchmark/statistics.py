"""Percentiles, intervals and tests from raw samples. Knows nothing of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.99
FLOATS = np.ndarray[Any, np.dtype[np.float64]]


class Percentile(BaseModel):
    """A percentile by nearest rank and the order-statistic interval [low, high] that covers the true one.

    All three are None, and `reason` says why, when there are too few samples to state it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Distribution(BaseModel):
    """What a set of samples says, in the samples' unit. Nothing is trimmed; there is no mean to hide a tail behind."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    count: int
    min: float
    p50: Percentile
    p90: Percentile
    p99: Percentile
    p99_9: Percentile
    max: float


@lru_cache(maxsize=64)
def minimum_samples(q: float, confidence: float = CONFIDENCE) -> int:
    """The fewest samples from which the percentile `q` (0 < q < 1) can be stated.

    The widest order-statistic interval runs from the smallest to the largest of n samples. It misses the percentile
    when all samples fall on one side of it, so it covers with probability 1 - qⁿ - (1-q)ⁿ (Wilks 1941, "Determination
    of sample sizes for setting tolerance limits"). At 99 %: p50 8, p90 44, p99 459, p99.9 4603.
    """
    count = math.ceil(math.log(1 - confidence) / math.log(max(q, 1 - q)))
    while 1 - q**count - (1 - q) ** count < confidence:
        count += 1
    return count


def nearest_rank(ordered: FLOATS, q: float) -> float:
    """The smallest sample that at least a share `q` of the ascending samples does not exceed: rank ceil(q·n)."""
    # q·n may land a rounding error above a whole rank: 0.99 · 700 is 693.0000000000001 on some platforms
    return float(ordered[max(1, math.ceil(q * len(ordered) - 1e-9)) - 1])


def percentile(samples: Sequence[float] | FLOATS, q: float, confidence: float = CONFIDENCE) -> Percentile:
    """The percentile `q` of `samples` with its interval, or the reason why it cannot be stated."""
    needed = minimum_samples(q, confidence)
    if len(samples) < needed:
        return Percentile(value=None, reason=f"insufficient samples: {len(samples)}, p{q * 100:g} needs {needed}")
    ordered = np.sort(np.asarray(samples, np.float64))
    low, high = _interval_ranks(len(ordered), q, confidence)
    return Percentile(value=nearest_rank(ordered, q), low=float(ordered[low - 1]), high=float(ordered[high - 1]))


@lru_cache(maxsize=64)
def _interval_ranks(count: int, q: float, confidence: float) -> tuple[int, int]:
    """The closest ranks l < u (from 1) whose samples enclose the percentile `q` with at least `confidence`.

    The samples below the percentile are Binomial(n, q), so [x(l), x(u)] covers it with probability F(u-1) - F(l-1)
    (David and Nagaraja, "Order Statistics", 7.1). Of equally narrow pairs, the one that covers best.
    """
    below = np.arange(count + 1, dtype=np.float64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(below[1:]))])
    log_mass = log_factorial[-1] - log_factorial - log_factorial[::-1] + below * math.log(q)
    cumulative = np.cumsum(np.exp(log_mass + (count - below) * math.log1p(-q)))[:count]
    lower = np.arange(1, count + 1)
    upper = np.searchsorted(cumulative, confidence + cumulative) + 1
    reaches = upper <= count
    lower, upper = lower[reaches], upper[reaches]
    narrowest = np.flatnonzero(upper - lower == (upper - lower).min())
    coverage = cumulative[upper[narrowest] - 1] - cumulative[lower[narrowest] - 1]
    best = narrowest[int(np.argmax(coverage))]
    return int(lower[best]), int(upper[best])


def summarise(samples: Sequence[float] | FLOATS) -> Distribution:
    """The distribution of at least one sample."""
    values = np.asarray(samples, np.float64)
    p50, p90, p99, p99_9 = (percentile(values, q) for q in (0.5, 0.9, 0.99, 0.999))
    return Distribution(
        count=len(values), min=float(values.min()), p50=p50, p90=p90, p99=p99, p99_9=p99_9, max=float(values.max())
    )


def median(samples: Sequence[float] | FLOATS) -> float:
    """The median by nearest rank, of however few samples."""
    return nearest_rank(np.sort(np.asarray(samples, np.float64)), 0.5)


def bootstrap_median_difference(
    a: Sequence[float] | FLOATS,
    b: Sequence[float] | FLOATS,
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Percentile-bootstrap interval of median(b) - median(a), in the samples' unit (Efron 1979)."""
    rng = np.random.default_rng(seed)
    differences = np.sort(_resampled_medians(b, resamples, rng) - _resampled_medians(a, resamples, rng))
    tail = (1 - confidence) / 2
    return nearest_rank(differences, tail), nearest_rank(differences, 1 - tail)


def bootstrap_rounds(
    a: Sequence[float] | FLOATS,
    b: Sequence[float] | FLOATS,
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """As `bootstrap_median_difference` for `a[i]` and `b[i]` that were measured in the same round i.

    Whole rounds are resampled, so what a round's moment does to both is in neither side's favour and does not widen
    the interval (Davison and Hinkley 1997, "Bootstrap Methods and their Application", 3.8). Raises ValueError where
    the sides have not as many rounds.
    """
    pairs = np.stack([np.asarray(a, np.float64), np.asarray(b, np.float64)])
    count = pairs.shape[1]
    rounds = np.random.default_rng(seed).integers(0, count, (resamples, count))
    rank = math.ceil(count / 2) - 1
    median_a, median_b = np.partition(pairs[:, rounds], rank, axis=-1)[..., rank]
    differences = np.sort(median_b - median_a)
    tail = (1 - confidence) / 2
    return nearest_rank(differences, tail), nearest_rank(differences, 1 - tail)


def _resampled_medians(samples: Sequence[float] | FLOATS, resamples: int, rng: np.random.Generator) -> FLOATS:
    """Medians of resamples without drawing them.

    A resample's k-th smallest is x at index floor(n·U(k)), with U(k) the k-th smallest of n uniforms: Beta(k, n-k+1).
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    count = len(ordered)
    rank = math.ceil(count / 2)
    index = np.floor(count * rng.beta(rank, count - rank + 1, resamples)).astype(np.int64)
    medians: FLOATS = ordered[np.minimum(index, count - 1)]
    return medians


def mann_whitney(a: Sequence[float] | FLOATS, b: Sequence[float] | FLOATS) -> float:
    """Two-sided p that `a` and `b` come from one law: U by the normal approximation with tie and continuity correction.

    Mann and Whitney 1947; the tie correction is Lehmann, "Nonparametrics", 1.4. Good from about eight samples a side.
    """
    pooled = np.concatenate([np.asarray(a, np.float64), np.asarray(b, np.float64)])
    _, place, ties = np.unique(pooled, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    total, count_a, count_b = len(pooled), len(a), len(b)
    u = float(ranks[:count_a].sum()) - count_a * (count_a + 1) / 2
    tied = float((ties.astype(np.float64) ** 3 - ties).sum())
    variance = count_a * count_b / 12 * ((total + 1) - tied / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(u - count_a * count_b / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))
