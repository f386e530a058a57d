"""Calibrators: from what was seen of a tensor to the range that its 8-bit form covers. Knows nothing of graphs.

All of them read two passes over the data. The first finds the extremes, the second counts |x| in bins of equal width
from zero to the largest |x|. Extremes and counts do not depend on the order or the batch size of the data, and their
size is fixed, so neither do the ranges and the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

CalibratorName = Literal["minmax", "entropy", "percentile", "mse"]


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
    """The first pass: the smallest and largest values of one tensor, zero included."""

    low: float = 0.0
    high: float = 0.0

    @property
    def amax(self) -> float:
        """The largest |x|."""
        return max(-self.low, self.high)

    def including(self, values: Array) -> Extremes:
        """The extremes of what was seen so far and of `values`. Raises InputError when one is NaN or infinite."""
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if not (np.isfinite(low) and np.isfinite(high)):
            count = values.size - np.count_nonzero(np.isfinite(values))
            raise InputError(f"{count} of {values.size} values are NaN or infinite")
        return Extremes(min(self.low, low), max(self.high, high))


class Histogram:
    """The second pass: how often |x| fell into each of `BINS` bins over (0, amax], and how often x was zero.

    Zero has an exact code in every range, so no calibrator may be swayed by how often it comes.
    """

    def __init__(self, extremes: Extremes) -> None:
        self.extremes = extremes
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.zeros = 0

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.extremes.amax / BINS

    def add(self, values: Array) -> None:
        """Count one sample. Raises InputError when it goes beyond the extremes: the data changed between the passes."""
        if values.min(initial=0.0) < self.extremes.low or values.max(initial=0.0) > self.extremes.high:
            raise InputError("values beyond those of the first pass")
        magnitudes = np.abs(values.reshape(-1).astype(np.float64))
        magnitudes = magnitudes[magnitudes > 0.0]
        self.zeros += values.size - magnitudes.size
        if magnitudes.size:
            # Divide by amax first: the width of a bin underflows where amax is near the smallest float.
            places = np.minimum((magnitudes / self.extremes.amax * BINS).astype(np.int64), BINS - 1)
            self.counts += np.bincount(places, minlength=BINS)

    def range(self, bins: float) -> Range:
        """What is left of the extremes when |x| is cut off after so many bins."""
        limit = min(bins / BINS, 1.0) * self.extremes.amax
        return Range(max(self.extremes.low, -limit), min(self.extremes.high, limit))


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
    """

    name: CalibratorName = "entropy"

    def range(self, histogram: Histogram) -> Range:
        counts = histogram.counts.astype(np.float64)
        if not counts.any():
            return histogram.range(BINS)
        stops = range(LEVELS, BINS + 1)
        return histogram.range(min(stops, key=lambda stop: (_divergence(counts, stop), stop)))


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
        "entropy": Entropy,
        "percentile": lambda: Percentile(percentile),
        "mse": Mse,
    }
    if name not in known:
        raise InputError(f"unknown calibrator {name!r}", hint=f"calibrators: {', '.join(known)}")
    return known[name]()


def _moments(counts: Array, middles: Array) -> tuple[Array, Array, Array]:
    return counts, counts * middles, counts * middles**2


def _divergence(counts: Array, stop: int) -> float:
    """KL divergence of the first `stop` bins, the tail in the last, from the same bins at 128 levels."""
    inside = counts[:stop]
    reference = inside.copy()
    reference[-1] += counts[stop:].sum()
    present = reference > 0
    starts = np.arange(LEVELS) * stop // LEVELS
    sums = np.add.reduceat(inside, starts)
    filled = np.add.reduceat(present.astype(np.float64), starts)
    mean = np.divide(sums, filled, out=np.zeros(LEVELS), where=filled > 0)
    quantized = np.maximum(np.repeat(mean, np.diff(np.append(starts, stop))), _EMPTY)[present]
    expected = reference[present] / reference.sum()
    return float((expected * np.log(expected / (quantized / quantized.sum()))).sum())
