"""Ranges come from running the FP32 graph; calibration data that cannot give any is refused by tensor and sample."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from vlaopt.artifact.graph import Graph
from vlaopt.errors import InputError, StageError
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import (
    BINS,
    Calibrator,
    CalibratorName,
    Entropy,
    MinMax,
    MovingAverage,
    Range,
    Steps,
    get,
)
from vlaopt.quantization.collect import collect as collect_found
from vlaopt.quantization.collect import collect_ranges

Feeds = list[dict[str, np.ndarray]]


def collect(graph: ModelProto, feeds: Feeds, tensors: list[str], calibrator: Calibrator | None = None) -> Any:
    """The ranges found on the same feeds in both passes."""
    numbered = [(str(number), feed) for number, feed in enumerate(feeds)]
    return collect_ranges(Graph(graph.SerializeToString()), lambda: numbered, tensors, calibrator or MinMax(), Silent())


def test_ranges_are_what_the_graph_computes(network: ModelProto, feeds: Feeds) -> None:
    found = collect(network, feeds, ["image in", "h", "r/🤖"])
    reference = onnx.reference.ReferenceEvaluator(network.SerializeToString())
    exposed = onnx.ModelProto.FromString(network.SerializeToString())
    exposed.graph.output.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, None))
    reference = onnx.reference.ReferenceEvaluator(exposed)
    hidden = np.stack([reference.run(["h"], feed)[0] for feed in feeds])
    assert found["image in"].high == max(float(feed["image in"].max()) for feed in feeds)
    assert found["h"].low == pytest.approx(float(hidden.min()), rel=1e-5)
    assert found["h"].high == pytest.approx(float(hidden.max()), rel=1e-5)
    assert found["r/🤖"].low == 0.0


def test_the_order_of_the_samples_changes_nothing(network: ModelProto, feeds: Feeds) -> None:
    tensors = ["image in", "c", "m"]
    assert collect(network, feeds[::-1], tensors, Entropy()) == collect(network, feeds, tensors, Entropy())


def test_no_tensors_need_no_data(network: ModelProto) -> None:
    assert collect(network, [], []) == {}


def test_no_samples_are_refused(network: ModelProto) -> None:
    with pytest.raises(InputError, match="no calibration samples"):
        collect(network, [], ["h"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_by_sample(network: ModelProto, feeds: Feeds, value: float) -> None:
    bad = {"image in": feeds[0]["image in"].copy()}
    bad["image in"][0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"tensor 'image in', calibration sample 2: 1 of 192 values are NaN"):
        collect(network, [*feeds[:2], bad], ["image in", "h"])


def test_one_outlier_is_refused_by_sample(network: ModelProto, feeds: Feeds) -> None:
    bad = {"image in": feeds[0]["image in"].copy()}
    bad["image in"][0, 0, 0, 0] = 1e30
    with pytest.raises(InputError, match="calibration sample 3 is an outlier: tensor 'image in' reaches 1e\\+30"):
        collect(network, [*feeds[:3], bad], ["image in"])


def test_a_step_of_a_loop_is_named_with_its_sample(network: ModelProto, feeds: Feeds) -> None:
    bad = {"image in": feeds[0]["image in"] * np.float32(np.nan)}
    labelled = [("40", feeds[1]), ("41", feeds[0]), ("41", bad)]
    with pytest.raises(InputError, match="tensor 'image in', calibration sample 41, step 1: 192 of 192 values are NaN"):
        collect_ranges(Graph(network.SerializeToString()), lambda: labelled, ["image in"], MinMax(), Silent())


def test_data_that_changes_between_the_passes_is_refused(network: ModelProto, feeds: Feeds) -> None:
    passes = iter([[("0", feed) for feed in feeds[:count]] for count in (3, 2)])
    with pytest.raises(InputError, match="the calibration data changed: 3 calls in the first pass, 2 in the second"):
        collect_ranges(Graph(network.SerializeToString()), lambda: next(passes), ["h"], MinMax(), Silent())


@pytest.mark.parametrize(
    "feed,problem",
    [
        ({"wrong": np.zeros((1, 3, 8, 8), np.float32)}, "input 'image in' is missing"),
        ({"image in": np.zeros((1, 8, 8, 3), np.float32)}, "has shape"),
        ({"image in": np.zeros((1, 3, 8, 8))}, "has dtype float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(network: ModelProto, feed: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        collect(network, [feed], ["h"])


LOOP = [("a", 1.0), ("a", 2.0), ("b", 3.0), ("b", 8.0), ("c", 0.5), ("c", 4.0)]
"""Three samples of two loop steps each, and how large their values are."""


@pytest.fixture
def loop(feeds: Feeds) -> list[tuple[str, dict[str, np.ndarray]]]:
    # Values of ±1 make the largest |x| of a call what LOOP says.
    ones = np.sign(feeds[0]["image in"])
    return [(sample, {"image in": (ones * size).astype(np.float32)}) for sample, size in LOOP]


@pytest.mark.parametrize("steps,amax", [("together", 8.0), ("union", 8.0), ("mean", (3.0 + 8.0) / 2)])
def test_every_loop_step_is_recorded_and_merged_as_asked(
    network: ModelProto, loop: list[Any], steps: Steps, amax: float
) -> None:
    graph = Graph(network.SerializeToString())
    found = collect_found(graph, lambda: loop, ["image in"], MinMax(), Silent(), steps)["image in"]
    assert found.range == Range(-amax, amax)
    assert [step.extremes.amax for step in found.steps] == [3.0, 8.0]
    own = [None, None] if steps == "together" else [Range(-3.0, 3.0), Range(-8.0, 8.0)]
    assert [step.range for step in found.steps] == own
    reversed_samples = [*loop[4:], *loop[2:4], *loop[:2]]
    again = collect_found(graph, lambda: reversed_samples, ["image in"], MinMax(), Silent(), steps)["image in"]
    assert (again.range, again.steps) == (found.range, found.steps)


@pytest.mark.parametrize("name", ["minmax", "moving-average", "percentile"])
def test_ranges_agree_with_those_of_onnxruntime(
    network: ModelProto, feeds: Feeds, tmp_path: Path, name: CalibratorName
) -> None:
    """On every float tensor of the graph. ONNX Runtime does not hold zero in its ranges; its bins begin elsewhere."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    tensors = ["image in", "c", "h", "d", "r/🤖", "a", "m", "p", "q", "y"]
    onnx.save(network, tmp_path / "model.onnx")
    files = {"model_path": tmp_path / "model.onnx", "augmented_model_path": str(tmp_path / "augmented.onnx")}
    theirs = {
        "minmax": lambda: calibrate.MinMaxCalibrater(**files),
        "moving-average": lambda: calibrate.MinMaxCalibrater(**files, moving_average=True),
        "percentile": lambda: calibrate.PercentileCalibrater(**files, symmetric=True, num_bins=BINS, percentile=99.0),
    }[name]()
    theirs.augment_graph()
    theirs.create_inference_session()
    theirs.collect_data(Reader(feeds))
    expected = {tensor: data.range_value for tensor, data in theirs.compute_data().data.items()}
    for tensor, ours in collect(network, feeds, tensors, get(name, percentile=99.0)).items():
        low, high = (float(np.ravel(value)[0]) for value in expected[tensor])
        bins = 2 * ours.amax / BINS if name == "percentile" else 0.0
        assert ours.low == pytest.approx(min(low, 0.0), rel=1e-5, abs=1e-6 + bins), tensor
        assert ours.high == pytest.approx(max(high, 0.0), rel=1e-5, abs=1e-6 + bins), tensor


class Reader:
    """Feeds as ONNX Runtime's calibrators ask for them."""

    def __init__(self, feeds: Feeds) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30]),
    sample=st.integers(0, 11),
    place=st.integers(0, 3 * 8 * 8 - 1),
)
def test_one_bad_value_anywhere_is_refused_by_its_sample(
    network: ModelProto, feeds: Feeds, bad: float, sample: int, place: int
) -> None:
    spoilt = feeds[sample]["image in"].copy()
    spoilt.reshape(-1)[place] = bad
    rows = [*feeds[:sample], {"image in": spoilt}, *feeds[sample + 1 :]]
    with pytest.raises(InputError, match=rf"calibration sample {sample}\b.*(NaN or infinite|is an outlier|reaches)"):
        collect(network, rows, ["image in", "h"])


def test_memory_does_not_grow_with_the_samples(network: ModelProto, feeds: Feeds) -> None:
    def peak(samples: int) -> int:
        """Bytes that Python and numpy took at most for so many samples, made one at a time."""

        def made() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
            for number in range(samples):
                yield str(number), {"image in": feeds[number % len(feeds)]["image in"] * np.float32(1.0)}

        tracemalloc.start()
        collect_ranges(Graph(network.SerializeToString()), made, ["image in", "c", "h"], MovingAverage(), Silent())
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    peak(4)
    # Every sample leaves its label and its largest |x| per tensor, about 100 bytes; its tensors take 4.9 kB.
    assert peak(400) < peak(40) + 360 * 200


def test_a_tensor_that_the_graph_lacks_is_an_error(network: ModelProto, feeds: Feeds) -> None:
    with pytest.raises(StageError, match="no tensor 'nowhere'"):
        collect(network, feeds, ["nowhere"])
