"""Calibrators choose ranges that hold zero, lie within what was seen, and do not depend on order or batch size."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaopt.errors import InputError
from vlaopt.quantization import calibrators
from vlaopt.quantization.calibrators import (
    BINS,
    Calibrator,
    CalibratorName,
    Entropy,
    Extremes,
    Found,
    Histogram,
    MinMax,
    MovingAverage,
    Mse,
    Percentile,
    Range,
    Steps,
    get,
)

COUNTING: tuple[CalibratorName, ...] = ("minmax", "entropy", "percentile", "mse")
"""Those that look at values alone, not at the call that they came with."""
NAMES: tuple[CalibratorName, ...] = (*COUNTING, "moving-average")

finite = st.floats(-(2.0**100), 2.0**100, width=32)
samples = hnp.arrays(np.float32, st.integers(1, 60), elements=finite)


def find(calibrator: Calibrator, parts: Sequence[np.ndarray]) -> Range:
    extremes = Extremes()
    for part in parts:
        extremes = extremes.joined(Extremes.of(part))
    histogram = Histogram(extremes)
    for part in parts:
        histogram.add(part)
    return calibrator.range(histogram)


@pytest.mark.parametrize("name", COUNTING)
@settings(max_examples=15)
@given(values=samples, data=st.data())
def test_order_and_batches_change_nothing(name: CalibratorName, values: np.ndarray, data: st.DataObject) -> None:
    calibrator = get(name)
    shuffled = values[data.draw(st.permutations(range(values.size)))]
    cuts = data.draw(st.lists(st.integers(0, values.size), max_size=3).map(sorted))
    assert find(calibrator, [values]) == find(calibrator, np.split(shuffled, cuts))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(calls=st.lists(samples, min_size=1, max_size=6), data=st.data())
def test_the_order_of_calls_changes_nothing(name: CalibratorName, calls: list[np.ndarray], data: st.DataObject) -> None:
    assert find(get(name), data.draw(st.permutations(calls))) == find(get(name), calls)


@given(calls=st.lists(samples, min_size=1, max_size=6))
def test_moving_average_is_the_mean_of_every_calls_extremes(calls: list[np.ndarray]) -> None:
    lows = [Fraction(float(call.min(initial=0.0))) for call in calls]
    highs = [Fraction(float(call.max(initial=0.0))) for call in calls]
    expected = Range(float(sum(lows) / len(calls)), float(sum(highs) / len(calls)))
    assert find(MovingAverage(), calls) == expected


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(values=samples)
def test_a_range_holds_zero_and_lies_within_the_data(name: CalibratorName, values: np.ndarray) -> None:
    found = find(get(name), [values])
    assert min(0.0, float(values.min())) <= found.low <= 0.0 <= found.high <= max(0.0, float(values.max()))
    assert found.amax > 0.0 or not values.any()


@given(values=samples)
def test_minmax_is_that_of_numpy_with_zero(values: np.ndarray) -> None:
    assert find(MinMax(), [values]) == Range(float(values.min(initial=0.0)), float(values.max(initial=0.0)))


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_numpy_to_two_bins(percentile: float) -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    expected = np.percentile(np.abs(values), percentile)
    assert find(Percentile(percentile), [values]).amax == pytest.approx(
        expected, abs=2 * float(np.abs(values).max()) / BINS
    )


@pytest.mark.parametrize("law", ["normal", "laplace", "standard_t"])
def test_entropy_agrees_with_onnxruntime(law: str) -> None:
    """Within 10 %: ONNX Runtime's own answer moves by as much with its number of bins, as it rounds them to levels."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    arguments = {"df": 4} if law == "standard_t" else {}
    values = getattr(np.random.default_rng(0), law)(size=200_000, **arguments).astype(np.float32)
    amax = float(np.abs(values).max())
    counts, edges = np.histogram(values, bins=BINS + 1, range=(-amax, amax))
    collector = calibrate.HistogramCollector(
        method="entropy", symmetric=True, num_bins=BINS + 1, num_quantized_bins=255, percentile=99.0, scenario="same"
    )
    threshold = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), amax), 255)
    assert find(Entropy(), [values]).amax == pytest.approx(float(threshold[1]), rel=0.1)


def test_mse_is_the_best_cut_off_of_a_brute_force_search() -> None:
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    amax = float(np.abs(values).max())

    def error(limit: float) -> float:
        scale = limit / 127
        return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).mean())

    best = min(error(amax * at / 256) for at in range(1, 257))
    assert error(find(Mse(), [values]).amax) <= 1.02 * best


@pytest.mark.parametrize("law", ["normal", "laplace", "standard_t"])
def test_mse_is_no_worse_than_torchs_search(law: str) -> None:
    """By the error that both minimise; torch searches in steps of its own, so the ranges themselves differ."""
    torch = pytest.importorskip("torch")
    observing = pytest.importorskip("torch.ao.quantization.observer")
    arguments = {"df": 4} if law == "standard_t" else {}
    values = getattr(np.random.default_rng(0), law)(size=50_000, **arguments).astype(np.float32)
    theirs = observing.HistogramObserver(
        bins=BINS, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127
    )
    theirs(torch.from_numpy(values))
    scale, _ = theirs.calculate_qparams()

    def error(step: float) -> float:
        return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).mean())

    assert error(find(Mse(), [values]).amax / 127) <= 1.01 * error(float(scale))


@settings(max_examples=50)
@given(values=samples)
def test_entropy_never_cuts_more_than_one_percent(values: np.ndarray) -> None:
    amax = find(Entropy(), [values]).amax
    present = np.abs(values[values != 0].astype(np.float64))
    # A value may lie in the bin in which the range ends.
    assert np.count_nonzero(present > amax * (1 + 1e-9) + present.max(initial=0.0) / BINS) <= 0.01 * present.size


@pytest.mark.parametrize("low,high", [(0.3, 0.9), (0.05, 0.65), (0.99, 1.0)])
def test_entropy_of_values_far_from_zero_covers_them(low: float, high: float) -> None:
    """Gates and attention weights: the divergence alone is least where everything is beyond the cut-off."""
    values = np.random.default_rng(0).uniform(low, high, 5_000).astype(np.float32)
    assert find(Entropy(), [values]).amax > low + 0.95 * (high - low)


@pytest.mark.parametrize("calibrator", [Entropy(), Percentile(99.9)])
def test_a_long_tail_is_cut_off(calibrator: Calibrator) -> None:
    values = np.append(np.random.default_rng(0).normal(size=50_000), 100.0).astype(np.float32)
    assert find(calibrator, [values]).amax < 30.0


@pytest.mark.parametrize("name", NAMES)
def test_how_often_zero_comes_does_not_sway_entropy_and_mse(name: CalibratorName) -> None:
    values = np.maximum(np.random.default_rng(0).normal(size=20_000), 0).astype(np.float32)
    more = np.append(values, np.zeros(100_000, np.float32))
    if name != "percentile":
        assert find(get(name), [values]) == find(get(name), [more])
    assert find(get(name), [values]).low == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_constant_zero_data_gives_an_empty_range(name: CalibratorName) -> None:
    assert find(get(name), [np.zeros(10, np.float32)]) == Range(0.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="1 of 3 values are NaN or infinite"):
        Extremes.of(np.array([1.0, value, 2.0], np.float32))


def test_other_data_in_the_second_pass_is_refused() -> None:
    with pytest.raises(InputError, match="beyond those of the first pass"):
        Histogram(Extremes(-1.0, 1.0)).add(np.array([1.5], np.float32))


def of_steps(name: CalibratorName, calls: list[np.ndarray], steps: Steps) -> Found:
    """What is found of calls that are one loop step each."""
    extremes = [Extremes.of(call) for call in calls]
    together = Histogram(reduce(Extremes.joined, extremes))
    each = [Histogram(step) for step in extremes]
    for histogram, call in zip(each, calls, strict=True):
        histogram.add(call)
        together.add(call)
    return calibrators.find(get(name), together, extremes, each, steps)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(calls=st.lists(samples, min_size=2, max_size=5))
def test_union_covers_every_step_and_mean_lies_between_them(name: CalibratorName, calls: list[np.ndarray]) -> None:
    union, mean = of_steps(name, calls, "union"), of_steps(name, calls, "mean")
    own = [find(get(name), [call]) for call in calls]
    assert [step.range for step in union.steps] == [step.range for step in mean.steps] == own
    assert union.range == Range(min(step.low for step in own), max(step.high for step in own))
    assert union.range.low <= mean.range.low <= max(step.low for step in own)
    assert min(step.high for step in own) <= mean.range.high <= union.range.high


@pytest.mark.parametrize("name", NAMES)
def test_steps_together_are_one_set_of_values(name: CalibratorName) -> None:
    generator = np.random.default_rng(0)
    calls = [(generator.normal(size=500) * 2.0**step).astype(np.float32) for step in range(4)]
    found = of_steps(name, calls, "together")
    assert found.range == find(get(name), calls)
    assert [step.extremes.high for step in found.steps] == [float(call.max()) for call in calls]
    assert [step.range for step in found.steps] == [None] * 4


def test_memory_does_not_grow_with_the_data() -> None:
    histogram = Histogram(Extremes(-1.0, 1.0))
    values = np.linspace(-1.0, 1.0, 100_001, dtype=np.float32)
    for _ in range(20):
        histogram.add(values)
    assert histogram.signed.nbytes == 2 * BINS * 8
    assert histogram.signed.sum() + histogram.zeros == 20 * values.size
    assert (histogram.signed[0] == histogram.signed[1]).all()


@pytest.mark.parametrize("low,high", [(0.5, 1.0), (-1.0, -0.5), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_without_zero_or_end_cannot_be_made(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="not a range around zero"):
        Range(low, high)


def test_an_unknown_calibrator_is_refused() -> None:
    with pytest.raises(InputError, match="unknown calibrator 'kl'"):
        get("kl")  # type: ignore[arg-type]


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentile_out_of_bounds_is_refused(percentile: float) -> None:
    with pytest.raises(InputError, match="a percentile is above 0 and at most 100"):
        get("percentile", percentile=percentile)
