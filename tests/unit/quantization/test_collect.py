"""Ranges come from running the FP32 graph; calibration data that cannot give any is refused by tensor and sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.reference
import pytest
from onnx import ModelProto

from vlaopt.errors import InputError, StageError
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import Entropy, MinMax
from vlaopt.quantization.collect import collect_ranges

Feeds = list[dict[str, np.ndarray]]


def test_ranges_are_what_the_graph_computes(network: ModelProto, feeds: Feeds) -> None:
    found = collect_ranges(network.SerializeToString(), lambda: feeds, ["image in", "h", "r/🤖"], MinMax(), Silent())
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
    graph, tensors = network.SerializeToString(), ["image in", "c", "m"]
    once = collect_ranges(graph, lambda: feeds, tensors, Entropy(), Silent())
    assert collect_ranges(graph, lambda: feeds[::-1], tensors, Entropy(), Silent()) == once


def test_no_tensors_need_no_data(network: ModelProto) -> None:
    assert collect_ranges(network.SerializeToString(), list, [], MinMax(), Silent()) == {}


def test_no_samples_are_refused(network: ModelProto) -> None:
    with pytest.raises(InputError, match="no calibration samples"):
        collect_ranges(network.SerializeToString(), list, ["h"], MinMax(), Silent())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_by_sample(network: ModelProto, feeds: Feeds, value: float) -> None:
    bad = {"image in": feeds[0]["image in"].copy()}
    bad["image in"][0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"tensor 'image in', calibration sample 2: 1 of 192 values are NaN"):
        collect_ranges(network.SerializeToString(), lambda: [*feeds[:2], bad], ["image in", "h"], MinMax(), Silent())


def test_one_outlier_is_refused_by_sample(network: ModelProto, feeds: Feeds) -> None:
    bad = {"image in": feeds[0]["image in"].copy()}
    bad["image in"][0, 0, 0, 0] = 1e30
    with pytest.raises(InputError, match="calibration sample 3 is an outlier: tensor 'image in' reaches 1e\\+30"):
        collect_ranges(network.SerializeToString(), lambda: [*feeds[:3], bad], ["image in"], MinMax(), Silent())


def test_data_that_changes_between_the_passes_is_refused(network: ModelProto, feeds: Feeds) -> None:
    passes = iter([feeds[:3], feeds[:2]])
    with pytest.raises(InputError, match="the calibration data changed: 3 samples in the first pass, 2 in the second"):
        collect_ranges(network.SerializeToString(), lambda: next(passes), ["h"], MinMax(), Silent())


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
        collect_ranges(network.SerializeToString(), lambda: [feed], ["h"], MinMax(), Silent())


def test_a_tensor_that_the_graph_lacks_is_an_error(network: ModelProto, feeds: Feeds) -> None:
    with pytest.raises(StageError, match="no tensor 'nowhere'"):
        collect_ranges(network.SerializeToString(), lambda: feeds, ["nowhere"], MinMax(), Silent())
