"""The fit of a tensor: shares and errors that counting finds are those of the values themselves, to one bin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaopt.artifact.artifact import Artifact
from vlaopt.errors import InputError
from vlaopt.quantization.calibrators import Extremes, Found, Histogram, MinMax, Range, Step
from vlaopt.quantization.fit import BARS, CalibrationReport, fits_of, noise, outliers, read_report, saturated, typical

VALUES = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)


def counted(values: np.ndarray) -> Histogram:
    histogram = Histogram(Extremes.of(values))
    histogram.add(values)
    return histogram


@pytest.mark.parametrize("covered", [Range(-2.0, 2.0), Range(-0.5, 6.0), Range(0.0, 3.0), Range(-99.0, 99.0)])
def test_saturation_is_that_of_the_values(covered: Range) -> None:
    expected = np.mean((covered.low > VALUES) | (covered.high < VALUES))
    # Between the middles of two bins lies at most as much as the fullest bin holds.
    assert saturated(counted(VALUES), covered) == pytest.approx(
        expected, abs=counted(VALUES).counts.max() / VALUES.size
    )


@given(values=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_nothing_lies_beyond_what_was_seen(values: np.ndarray) -> None:
    histogram = counted(values)
    assert saturated(histogram, MinMax().range(histogram)) == 0.0
    assert 0.0 <= noise(histogram, MinMax().range(histogram)) <= 1.0


@pytest.mark.parametrize("limit", [1.0, 3.0, 6.0, 12.0, 1000.0])
def test_noise_is_the_error_of_quantizing_the_values(limit: float) -> None:
    scale = limit / 127
    error = np.clip(np.rint(VALUES / scale), -127, 127) * scale - VALUES
    expected = np.sqrt(np.mean(error**2) / np.mean(VALUES**2))
    assert noise(counted(VALUES), Range(-limit, limit)) == pytest.approx(float(expected), rel=0.05)


def test_an_outlier_shows() -> None:
    usual = np.percentile(np.abs(VALUES), 99.9)
    assert outliers(counted(VALUES)) == pytest.approx(np.abs(VALUES).max() / usual, rel=0.01)
    spoilt = counted(np.append(VALUES, np.float32(5000.0)))
    assert outliers(spoilt) > 100
    assert noise(spoilt, Range(-5000.0, 5000.0)) > 5 * noise(counted(VALUES), Range(-12.0, 12.0))


@pytest.mark.parametrize("limit", [1.0, 4.0, 12.0])
def test_typical_is_the_median_in_steps(limit: float) -> None:
    histogram = counted(VALUES)
    expected = np.median(np.abs(VALUES)) / (limit / 127)
    assert typical(histogram, Range(-limit, limit)) == pytest.approx(expected, abs=histogram.width / (limit / 127))


def test_one_loud_channel_leaves_the_others_no_steps() -> None:
    """It makes up most of the RMS and of the largest values, so that noise and outliers do not show it."""
    channels = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    channels[:, 5] *= 500.0
    histogram = counted(channels)
    covered = Range(-histogram.extremes.amax, histogram.extremes.amax)
    assert typical(histogram, covered) < 0.2
    assert noise(histogram, covered) < 0.02
    assert outliers(histogram) < 3.0


def test_values_that_are_all_zero_have_no_error() -> None:
    zeros = counted(np.zeros(10, np.float32))
    assert typical(zeros, Range(0.0, 0.0)) == 0.0
    assert (saturated(zeros, Range(0.0, 0.0)), outliers(zeros), noise(zeros, Range(0.0, 0.0))) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e38])
def test_the_size_of_the_values_changes_nothing(size: float) -> None:
    values = np.linspace(-1.0, 1.0, 1001).astype(np.float32)
    values = (np.sign(values) * size).astype(np.float32) if size < 1e-40 else (values * size).astype(np.float32)
    histogram = counted(values)
    amax = histogram.extremes.amax
    assert 0.0 < noise(histogram, Range(-amax, amax)) < 0.01
    assert noise(histogram, Range(-amax / 1000, amax / 1000)) > 0.9


def report() -> CalibrationReport:
    histogram = counted(VALUES)
    steps = (Step(Extremes(-1.0, 2.0), Range(-1.0, 1.5)), Step(histogram.extremes, None))
    good = Found(Range(-9.0, 9.0), histogram, steps[:1])
    bad = Found(Range(-0.1, 0.1), histogram, steps)
    return CalibrationReport(
        calibrator="mse",
        steps="union",
        samples=3,
        components={"head": fits_of({"good": good, "bad": bad}, {"bad": ["layers.1/Gemm"]})},
    )


def test_the_worst_comes_first_and_a_loop_is_told_step_by_step() -> None:
    (component, tensor, fit), (_, second, other) = report().worst_first()
    assert (component, tensor, second) == ("head", "bad", "good")
    assert fit.steps[0].seen == (-1.0, 2.0)
    assert fit.steps[0].range == (-1.0, 1.5)
    assert fit.steps[1].range is None
    assert other.steps == ()
    assert (fit.taken_by, other.taken_by) == (("layers.1/Gemm",), ())
    assert report().loops_first() == [("head", "bad", fit)]
    assert fit.spread() == pytest.approx(np.abs(VALUES).max() / 2.0, rel=1e-4)
    assert len(fit.bars) == BARS
    assert sum(fit.bars) == np.count_nonzero(VALUES)


def test_a_report_is_read_as_it_was_written() -> None:
    again = CalibrationReport.model_validate_json(report().model_dump_json(by_alias=True))
    assert again == report()


def test_an_artifact_without_ranges_is_refused(tiny_artifact: Artifact) -> None:
    with pytest.raises(InputError, match="nothing was calibrated for this artifact") as raised:
        read_report(tiny_artifact)
    assert raised.value.exit_code == 2
