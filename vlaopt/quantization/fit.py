"""How well 8 bits hold what calibration saw of each tensor, as data. Knows neither graphs nor torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import first_problem
from vlaopt.errors import InputError
from vlaopt.quantization.calibrators import BINS, LEVELS, CalibratorName, Found, Histogram, Range, Steps
from vlaopt.tensors import Array

REPORT = "reports/calibration.json"
BARS = 128
_USUAL = 99.9
"""Percent of the values that an outlier is held against."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class StepFit(_Frozen):
    """One loop step: the extremes seen, and the range found for it alone (null where steps are calibrated together)."""

    seen: tuple[float, float]
    range: tuple[float, float] | None


class TensorFit(_Frozen):
    """One activation. Shares and errors are those of the histogram: right to one of its 2048 bins."""

    range: tuple[float, float] = Field(description="What its 8-bit form covers.")
    seen: tuple[float, float] = Field(description="Its smallest and largest value, zero included.")
    saturated: float = Field(ge=0, le=1, description="Share of its values beyond the range.")
    outliers: float = Field(ge=0, description="Largest |x| over the 99.9th percentile of those that are not zero.")
    typical: float = Field(
        ge=0, description="Median |x| of those that are not zero, in steps of symmetric 8-bit numbers over the range."
    )
    noise: float = Field(ge=0, description="RMS error of symmetric 8-bit numbers over the range, relative to its RMS.")
    taken_by: tuple[str, ...] = Field(description="The nodes that take it.")
    bars: tuple[int, ...] = Field(description="How often |x| fell into equal parts of 0 to its largest; without zeros.")
    steps: tuple[StepFit, ...] = Field(description="Each loop step; empty for a component that is called once.")

    def spread(self) -> float:
        """The largest |x| of the loudest loop step over that of the quietest; 1 without a loop."""
        largest = [max(-step.seen[0], step.seen[1]) for step in self.steps]
        return max(largest) / max(min(largest), 1e-30) if largest and max(largest) > 0.0 else 1.0


class CalibrationReport(_Frozen):
    """The activations of a policy, by component and tensor, as they were calibrated."""

    schema_: Literal["vlaopt.calibration-report/1"] = Field(default="vlaopt.calibration-report/1", alias="schema")
    calibrator: CalibratorName
    steps: Steps
    samples: int
    components: dict[str, dict[str, TensorFit]]

    def worst_first(self) -> list[tuple[str, str, TensorFit]]:
        """Component, tensor and fit, by falling noise."""
        every = [(name, tensor, fit) for name, fits in self.components.items() for tensor, fit in fits.items()]
        return sorted(every, key=lambda one: (-one[2].noise, one[0], one[1]))

    def loops_first(self) -> list[tuple[str, str, TensorFit]]:
        """Those of loops, by how much larger their largest |x| is in one step than in another."""
        loops = [one for one in self.worst_first() if one[2].steps]
        return sorted(loops, key=lambda one: -one[2].spread())


def fits_of(collected: Mapping[str, Found], takers: Mapping[str, Sequence[str]]) -> dict[str, TensorFit]:
    """The fit of every tensor that was calibrated, by name; `takers` are the names of the nodes that take a tensor."""
    return {name: _fit(found, takers.get(name, ())) for name, found in collected.items()}


def read_report(artifact: Artifact) -> CalibrationReport:
    """The report in an artifact of `quantize` or a later stage.

    Raises InputError when nothing was calibrated for it, or when the report is unsound.
    """
    if not artifact.has(REPORT):
        raise InputError(
            "nothing was calibrated for this artifact",
            where=str(artifact.path),
            hint="give one of stage quantize or later whose recipe says quantize.scheme: int8, built by this version",
        )
    try:
        return CalibrationReport.model_validate_json(artifact.read(REPORT))
    except ValidationError as error:
        raise InputError(first_problem(error), where=REPORT) from error


def _fit(found: Found, takers: Sequence[str]) -> TensorFit:
    histogram, covered = found.histogram, found.range
    seen = histogram.extremes
    loop = found.steps if len(found.steps) > 1 else ()
    return TensorFit(
        range=_pair(covered.low, covered.high),
        seen=_pair(seen.low, seen.high),
        saturated=_short(saturated(histogram, covered)),
        outliers=_short(outliers(histogram)),
        typical=_short(typical(histogram, covered)),
        noise=_short(noise(histogram, covered)),
        taken_by=tuple(takers),
        bars=tuple(histogram.counts.reshape(BARS, -1).sum(axis=1).tolist()),
        steps=tuple(
            StepFit(
                seen=_pair(step.extremes.low, step.extremes.high),
                range=None if step.range is None else _pair(step.range.low, step.range.high),
            )
            for step in loop
        ),
    )


def saturated(histogram: Histogram, covered: Range) -> float:
    """The share of all values, zeros among them, that lie beyond `covered`."""
    nonzero = int(histogram.signed.sum())
    if not nonzero:
        return 0.0
    return float(histogram.signed[_beyond(histogram, covered)].sum() / (nonzero + histogram.zeros))


def outliers(histogram: Histogram) -> float:
    """The largest |x| over the 99.9th percentile of those that are not zero; at least 1, and 0 when all are zero."""
    bins = _percentile(histogram, _USUAL)
    return BINS / bins if bins else 0.0


def typical(histogram: Histogram, covered: Range) -> float:
    """The median |x| of the values that are not zero, in steps of symmetric 8-bit numbers over `covered`.

    Small where a few channels or values are much larger than the rest, which then becomes a step or nothing.
    """
    bins = _percentile(histogram, 50.0)
    return min(bins * (LEVELS - 1) / float(_limits(histogram, covered).max()), LEVELS - 1) if bins else 0.0


def noise(histogram: Histogram, covered: Range) -> float:
    """RMS error of symmetric 8-bit numbers over `covered`, relative to the RMS of the values.

    As in calibrator `mse`: uniform over one step inside, the distance to the limit beyond; a value below half a step
    becomes zero. 1 where nothing is left of the values, 0 where all are zero.
    """
    middles = _middles()
    squares = float((histogram.counts * middles**2).sum())
    if not squares:
        return 0.0
    limits = _limits(histogram, covered)
    step = limits.max() / (LEVELS - 1)
    inside = np.where(middles < step / 2.0, middles**2, step**2 / 12.0)
    errors = np.where(_beyond(histogram, covered), (middles - limits) ** 2, inside)
    return float(np.sqrt((histogram.signed * errors).sum() / squares))


def _percentile(histogram: Histogram, percent: float) -> float:
    """Of the |x| that are not zero, in bins, from the upper end of one; 0 when all are zero."""
    counted = np.cumsum(histogram.counts)
    return float(np.searchsorted(counted, percent / 100.0 * counted[-1]) + 1) if counted[-1] else 0.0


def _middles() -> Array:
    """Of the bins, in bins, because squares of values may underflow; [BINS]."""
    middles: Array = np.arange(BINS) + 0.5
    return middles


def _beyond(histogram: Histogram, covered: Range) -> Array:
    """Which bins of positive and of negative values lie beyond `covered`, by their middles; bool [2, BINS]."""
    seen = histogram.extremes
    cut = np.array([[covered.high < seen.high], [covered.low > seen.low]])
    beyond: Array = cut & (_middles() > _limits(histogram, covered))
    return beyond


def _limits(histogram: Histogram, covered: Range) -> Array:
    """Of positive and of negative values, in bins, [2, 1]."""
    limits: Array = np.array([[covered.high], [-covered.low]]) / histogram.extremes.amax * BINS
    return limits


def _pair(low: float, high: float) -> tuple[float, float]:
    return _short(low), _short(high)


def _short(value: float) -> float:
    """Six digits: enough for people, and a report of a hundred loop steps stays small."""
    return float(f"{value:.6g}")
