"""Ranges come from running the FP32 graph; calibration data that cannot give any is refused by tensor and sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.reference
import pytest
from onnx import ModelProto

from vlaopt.artifact.graph import Graph
from vlaopt.errors import InputError, StageError
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import Calibrator, Entropy, MinMax
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
    labelled = [("41, step 0", feeds[0]), ("41, step 1", bad)]
    with pytest.raises(InputError, match="tensor 'image in', calibration sample 41, step 1: 192 of 192 values are NaN"):
        collect_ranges(Graph(network.SerializeToString()), lambda: labelled, ["image in"], MinMax(), Silent())


def test_data_that_changes_between_the_passes_is_refused(network: ModelProto, feeds: Feeds) -> None:
    passes = iter([[("0", feed) for feed in feeds[:count]] for count in (3, 2)])
    with pytest.raises(InputError, match="the calibration data changed: 3 samples in the first pass, 2 in the second"):
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


def test_a_tensor_that_the_graph_lacks_is_an_error(network: ModelProto, feeds: Feeds) -> None:
    with pytest.raises(StageError, match="no tensor 'nowhere'"):
        collect(network, feeds, ["nowhere"])
