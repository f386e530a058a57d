"""Calibrators: from what was seen of a tensor to the range that its 8-bit form covers. Knows nothing of graphs.

All of them read two passes over the data. The first finds the extremes of every call, the second counts |x| in bins of
equal width from zero to the largest |x|. Extremes, exact sums and counts do not depend on the order of the calls, and
their size is fixed, so neither do the ranges and the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np

from vlaopt.errors import InputError
from vlaopt.tensors import Array

BINS = 2048
"""Bins of |x|: those of TensorRT's entropy calibration (S. Migacz, "8-bit Inference with TensorRT", GTC 2017)."""

LEVELS = 128
"""Magnitudes of a symmetric 8-bit number, zero included."""

_EMPTY = 1e-4
"""Counts of a bin where only the tail is: MXNet's and ONNX Runtime's smoothing, which keeps the divergence finite."""

_KEPT = 0.99
"""Share of the values that are not zero which calibration by entropy always covers."""

CalibratorName = Literal["minmax", "moving-average", "entropy", "percentile", "mse"]

Steps = Literal["together", "union", "mean"]
"""How loop steps make one range: all values calibrated together, or the union or mean of the ranges of the steps."""


@dataclass(frozen=True)
class Range:
    """What the 8-bit form of a tensor covers, `low <= 0 <= high`: zero always has an exact code."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite([self.low, self.high]).all() and self.low <= 0.0 <= self.high):
            raise ValueError(f"not a range around zero: [{self.low}, {self.high}]")

    @property
    def amax(self) -> float:
        """The largest magnitude covered."""
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Extremes:
    """The first pass: the smallest and largest values of one tensor, zero included, and their exact sums over calls."""

    low: float = 0.0
    high: float = 0.0
    lows: Fraction = Fraction(0)
    highs: Fraction = Fraction(0)
    calls: int = 0

    @classmethod
    def of(cls, values: Array) -> Extremes:
        """Those of one call. Raises InputError when a value is NaN or infinite."""
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if not (np.isfinite(low) and np.isfinite(high)):
            count = values.size - np.count_nonzero(np.isfinite(values))
            raise InputError(f"{count} of {values.size} values are NaN or infinite")
        return cls(low, high, Fraction(low), Fraction(high), 1)

    @property
    def amax(self) -> float:
        """The largest |x|."""
        return max(-self.low, self.high)

    @property
    def mean(self) -> Range:
        """From the mean of the calls' lows to the mean of their highs."""
        calls = max(self.calls, 1)
        return Range(float(self.lows / calls), float(self.highs / calls))

    def joined(self, other: Extremes) -> Extremes:
        """The extremes of the calls of both."""
        return Extremes(
            min(self.low, other.low),
            max(self.high, other.high),
            self.lows + other.lows,
            self.highs + other.highs,
            self.calls + other.calls,
        )


class Histogram:
    """The second pass: how often |x| fell into each of `BINS` bins over (0, amax], and how often x was zero.

    Zero has an exact code in every range, so no calibrator may be swayed by how often it comes. `signed` counts
    positive and negative values by themselves, int64 [2, BINS].
    """

    def __init__(self, extremes: Extremes) -> None:
        self.extremes = extremes
        self.signed = np.zeros((2, BINS), dtype=np.int64)
        self.zeros = 0

    @property
    def counts(self) -> Array:
        """Of |x|, int64 [BINS]."""
        total: Array = self.signed.sum(axis=0)
        return total

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.extremes.amax / BINS

    def add(self, values: Array) -> None:
        """Count one sample. Raises InputError when it goes beyond the extremes: the data changed between the passes."""
        if values.min(initial=0.0) < self.extremes.low or values.max(initial=0.0) > self.extremes.high:
            raise InputError("values beyond those of the first pass")
        present = values[values != 0.0].astype(np.float64)
        self.zeros += values.size - present.size
        if present.size:
            # Divide by amax first: the width of a bin underflows where amax is near the smallest float.
            places = np.minimum((np.abs(present) / self.extremes.amax * BINS).astype(np.int64), BINS - 1)
            places += BINS * (present < 0.0)
            self.signed += np.bincount(places, minlength=2 * BINS).reshape(2, BINS)

    def range(self, bins: float) -> Range:
        """What is left of the extremes when |x| is cut off after so many bins."""
        limit = min(bins / BINS, 1.0) * self.extremes.amax
        return Range(max(self.extremes.low, -limit), min(self.extremes.high, limit))


@dataclass(frozen=True)
class Step:
    """One tensor in one loop step of all samples; `range` is None where the steps are calibrated together."""

    extremes: Extremes
    range: Range | None


@dataclass(frozen=True)
class Found:
    """One tensor: its range, the values of all calls counted together, and each loop step; one step without a loop."""

    range: Range
    histogram: Histogram
    steps: tuple[Step, ...]


class Calibrator(Protocol):
    """Chooses a range from both passes."""

    @property
    def name(self) -> CalibratorName: ...

    def range(self, histogram: Histogram) -> Range:
        """The range to cover."""
        ...


@dataclass(frozen=True)
class MinMax:
    """Everything that was seen."""

    name: CalibratorName = "minmax"

    def range(self, histogram: Histogram) -> Range:
        return histogram.range(BINS)


@dataclass(frozen=True)
class MovingAverage:
    """From the mean over calls of their smallest value to the mean of their largest, zero included in each.

    ONNX Runtime's `moving_average` is that mean within a batch of samples and decays over batches, so that it depends
    on their size and order; the plain mean does not.
    """

    name: CalibratorName = "moving-average"

    def range(self, histogram: Histogram) -> Range:
        return histogram.extremes.mean


@dataclass(frozen=True)
class Percentile:
    """The smallest range that `percentile` percent of the values lie in, to one bin; zeros count as values."""

    percentile: float
    name: CalibratorName = "percentile"

    def __post_init__(self) -> None:
        if not 0.0 < self.percentile <= 100.0:
            raise InputError(f"a percentile is above 0 and at most 100, not {self.percentile}")

    def range(self, histogram: Histogram) -> Range:
        covered = histogram.zeros + np.cumsum(histogram.counts)
        wanted = self.percentile / 100.0 * covered[-1]
        return histogram.range(float(np.searchsorted(covered, wanted) + 1))


@dataclass(frozen=True)
class Entropy:
    """The cut-off that loses the least information: least Kullback-Leibler divergence from the data's distribution.

    For every cut-off from 128 bins up, the distribution with its tail moved into the last bin is compared with the same
    distribution at 128 levels (S. Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Cut-offs that leave out more than 1 % of the values are not looked at: with the tail in the last bin the divergence
    does not see how far away it is, and is least below everything where no values are near zero, such as of gates.
    """

    name: CalibratorName = "entropy"

    def range(self, histogram: Histogram) -> Range:
        counts = histogram.counts.astype(np.float64)
        if not counts.any():
            return histogram.range(BINS)
        kept = int(np.searchsorted(np.cumsum(counts), _KEPT * counts.sum()) + 1)
        first = max(kept, LEVELS)
        # Cut-offs that lose nothing differ by rounding alone; the first of them is taken.
        return histogram.range(float(first + np.argmin(_divergences(counts)[first - LEVELS :].round(12))))


@dataclass(frozen=True)
class Mse:
    """The cut-off of least squared error of symmetric 8-bit numbers, over the middles of the bins.

    Inside the cut-off an error is uniform over one step, beyond it is the distance to the cut-off.
    """

    name: CalibratorName = "mse"

    def range(self, histogram: Histogram) -> Range:
        counts = histogram.counts.astype(np.float64)
        if not counts.any():
            return histogram.range(BINS)
        middles = np.arange(BINS) + 0.5
        # For cut-off T in bins, sum over i >= T of n_i (m_i - T)^2, from sums over the tails of n, n m and n m^2.
        stops = np.arange(1, BINS + 1, dtype=np.float64)
        n, nm, nmm = (np.append(np.cumsum(part[::-1])[::-1], 0.0)[1:] for part in _moments(counts, middles))
        clipping = nmm - 2.0 * stops * nm + stops**2 * n
        rounding = (counts.sum() - n) * (stops / (LEVELS - 1)) ** 2 / 12.0
        return histogram.range(float(stops[np.argmin(clipping + rounding)]))


def get(name: CalibratorName, *, percentile: float = 99.99) -> Calibrator:
    """The calibrator called `name`; `percentile` is for the one of that name."""
    known: dict[str, Callable[[], Calibrator]] = {
        "minmax": MinMax,
        "moving-average": MovingAverage,
        "entropy": Entropy,
        "percentile": lambda: Percentile(percentile),
        "mse": Mse,
    }
    if name not in known:
        raise InputError(f"unknown calibrator {name!r}", hint=f"calibrators: {', '.join(known)}")
    return known[name]()


def find(
    calibrator: Calibrator,
    together: Histogram,
    extremes: Sequence[Extremes],
    each: Sequence[Histogram],
    steps: Steps,
) -> Found:
    """What `calibrator` finds of one tensor, from `extremes` of every loop step and `each`, their histograms.

    `each` is not looked at where the steps are calibrated together.
    """
    if steps == "together":
        return Found(calibrator.range(together), together, tuple(Step(seen, None) for seen in extremes))
    ranges = [calibrator.range(histogram) for histogram in each]
    lows, highs = [found.low for found in ranges], [found.high for found in ranges]
    if steps == "union":
        merged = Range(min(lows), max(highs))
    else:
        merged = Range(math.fsum(lows) / len(lows), math.fsum(highs) / len(highs))
    return Found(merged, together, tuple(map(Step, extremes, ranges)))


def _moments(counts: Array, middles: Array) -> tuple[Array, Array, Array]:
    return counts, counts * middles, counts * middles**2


def _divergences(counts: Array) -> Array:
    """KL divergence, for every cut-off from `LEVELS` bins up, of the bins before it from the same bins at 128 levels.

    The tail is in the last bin. A level's bins that are not empty share its mean, so that the sums over the bins of
    p log p and p log q need only sums over levels, which are differences of running sums. float64 [BINS - LEVELS + 1].
    """
    stops = np.arange(LEVELS, BINS + 1)
    total, present, own = (np.append(0.0, np.cumsum(part)) for part in (counts, counts > 0, _xlogx(counts)))
    last, tail = counts[stops - 1], total[-1] - total[stops]
    edges = stops[:, None] * np.arange(LEVELS + 1) // LEVELS
    sums, filled = np.diff(total[edges]), np.diff(present[edges])
    filled[:, -1] += (last == 0) & (tail > 0)
    mean = np.maximum(np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0), _EMPTY)
    sums[:, -1] += tail
    of_reference = own[stops] - _xlogx(last) + _xlogx(last + tail)
    of_levels = (sums * np.log(mean)).sum(axis=1)
    divergences: Array = (of_reference - of_levels) / total[-1] + np.log((filled * mean).sum(axis=1) / total[-1])
    return divergences


def _xlogx(values: Array) -> Array:
    logs: Array = values * np.log(np.maximum(values, 1.0))
    return logs
