"""Q/DQ nodes make a graph that both CPU libraries run close to FP32, in the form that each backend needs."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto, numpy_helper

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Placement
from vlaopt.errors import StageError
from vlaopt.graph.topology import opset_of
from vlaopt.quantization.placement import activation_parameters, write_qdq
from vlaopt.quantization.plan import ComponentPlan, calibrated_tensors, component_plan, plan_nodes
from vlaopt.quantization.structure import quantized_layers, structural_check
from vlaopt.quantization.weights import REDUCED_LIMIT, SMALLEST_SCALE, WEIGHT_LIMIT, quantize_weight

PLACEMENTS: tuple[Placement, ...] = ("onnxruntime", "openvino", "tensorrt")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("library", ["run_onnxruntime", "run_openvino"])
def test_the_graph_stays_near_fp32(
    network: ModelProto,
    plan: ComponentPlan,
    feeds: Any,
    placement: Placement,
    weights: Any,
    library: str,
    request: Any,
) -> None:
    run = request.getfixturevalue(library)
    quantized = write_qdq(network, plan, placement=placement, weights=weights)
    expected = np.stack([run(network, feed) for feed in feeds])
    got = np.stack([run(quantized, feed) for feed in feeds])
    assert np.abs(got - expected).max() < 0.06 * np.abs(expected).max()
    assert np.abs(got - expected).max() > 0.0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_form_is_right_and_every_planned_layer_computes_in_8_bit(
    network: ModelProto, plan: ComponentPlan, placement: Placement
) -> None:
    quantized = write_qdq(network, plan, placement=placement)
    structural_check(quantized, placement)
    assert quantized_layers(quantized) == plan.named("int8")
    assert opset_of(quantized) == opset_of(network)


def test_onnx_runtime_computes_every_planned_layer_in_integers(network: ModelProto, plan: ComponentPlan) -> None:
    from vlaopt.backends import EngineOptions
    from vlaopt.backends.onnxruntime import BACKEND

    engine = BACKEND.build(
        Graph(write_qdq(network, plan, placement="onnxruntime").SerializeToString()), EngineOptions(threads=1)
    )
    assert engine.precisions == {"int8": 4}


def test_each_form_is_refused_as_the_other(network: ModelProto, plan: ComponentPlan) -> None:
    with pytest.raises(
        StageError, match="'image in_quantized/QuantizeLinear' is uint8 where int8 or float8e4m3fn is needed"
    ):
        structural_check(write_qdq(network, plan, placement="onnxruntime"), "tensorrt")
    with pytest.raises(StageError, match="is int8 where uint8 is needed"):
        structural_check(write_qdq(network, plan, placement="tensorrt"), "onnxruntime")


def test_a_tensor_is_quantized_once_however_many_take_it(network: ModelProto, plan: ComponentPlan) -> None:
    for placement in PLACEMENTS:
        quantized = write_qdq(network, plan, placement=placement)
        sources = Counter(node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear")
        assert set(sources.values()) == {1}


def test_the_int8_form_quantizes_only_what_a_layer_takes_and_no_bias(network: ModelProto, plan: ComponentPlan) -> None:
    quantized = write_qdq(network, plan, placement="tensorrt")
    sources = {node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    assert sources == {"image in", "h", "m", "q"}
    assert {"stem.bias", "project.bias"} <= {tensor.name for tensor in quantized.graph.initializer}


def test_the_uint8_form_has_int32_biases_of_the_scale_of_the_products(network: ModelProto, plan: ComponentPlan) -> None:
    quantized = write_qdq(network, plan, placement="onnxruntime")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    assert values["stem.bias_quantized"].dtype == np.int32
    np.testing.assert_array_equal(values["stem.bias_scale"], values["image in_scale"] * values["stem.weight_scale"])


def test_the_model_given_is_left_alone_and_equal_plans_give_equal_bytes(
    network: ModelProto, plan: ComponentPlan
) -> None:
    before = network.SerializeToString()
    first, second = (write_qdq(network, plan, placement="onnxruntime").SerializeToString() for _ in range(2))
    assert first == second
    assert network.SerializeToString() == before


def test_a_plan_without_int8_gives_the_same_graph_back(network: ModelProto) -> None:
    nodes = plan_nodes({"vision": network}, scheme="int8", rules=[("vision", "fp32")])["vision"]
    result = write_qdq(network, component_plan(Graph(b""), nodes, {}), placement="onnxruntime")
    assert [node.name for node in result.graph.node] == [node.name for node in network.graph.node]


def test_a_missing_range_is_an_error(network: ModelProto, plan: ComponentPlan) -> None:
    ranges = {name: value for name, value in plan.ranges.items() if name != "m"}
    with pytest.raises(StageError, match="the plan has no range of 'm'"):
        write_qdq(network, plan.model_copy(update={"ranges": ranges}), placement="tensorrt")


def test_a_plan_for_another_graph_is_an_error(recurrent: ModelProto, plan: ComponentPlan) -> None:
    with pytest.raises(StageError, match="the plan names 'stem/Conv'"):
        write_qdq(recurrent, plan, placement="onnxruntime")


@pytest.mark.parametrize("library", ["run_onnxruntime", "run_openvino"])
@pytest.mark.parametrize("zeroed", ["stem.weight", "project.weight"])
def test_a_layer_pruned_to_zeros_gives_its_bias(
    network: ModelProto, plan: ComponentPlan, feeds: Any, library: str, zeroed: str, request: Any
) -> None:
    pruned = ModelProto.FromString(network.SerializeToString())
    tensor = next(entry for entry in pruned.graph.initializer if entry.name == zeroed)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), zeroed))
    run = request.getfixturevalue(library)
    for placement in PLACEMENTS:
        quantized = write_qdq(pruned, plan, placement=placement)
        structural_check(quantized, placement)
        expected = run(pruned, feeds[0])
        np.testing.assert_allclose(run(quantized, feeds[0]), expected, atol=0.06 * np.abs(expected).max())


@pytest.mark.parametrize("library", ["run_onnxruntime", "run_openvino"])
def test_stored_int8_makes_recurrent_weights_a_quarter_and_changes_little(
    recurrent: ModelProto, library: str, request: Any
) -> None:
    nodes = plan_nodes({"vision": recurrent}, scheme="int8", rules=[("vision", "int8-weights")])["vision"]
    assert calibrated_tensors(recurrent, nodes) == []
    quantized = write_qdq(recurrent, component_plan(Graph(b""), nodes, {}), placement="tensorrt")
    structural_check(quantized, "tensorrt")
    run = request.getfixturevalue(library)
    feed = {"tokens": np.array([[1, 2, 3, 4, 5, 9]], np.int64)}
    np.testing.assert_allclose(run(quantized, feed), run(recurrent, feed), atol=0.02)
    stored = {tensor.data_type for tensor in quantized.graph.initializer if len(tensor.dims) > 1}
    assert stored == {numpy_helper.from_array(np.zeros(1, np.int8)).data_type}


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@given(low=st.floats(-(2.0**100), 0, width=32), high=st.floats(0, 2.0**100, width=32))
def test_a_scale_is_positive_and_its_codes_reach_over_the_range(
    kind: Literal["uint8", "int8"], low: float, high: float
) -> None:
    scale, zero_point = activation_parameters(low, high, kind)
    assert scale.dtype == np.float32
    assert SMALLEST_SCALE <= scale < np.inf
    if kind == "int8":
        assert zero_point == 0
        assert float(scale) * 127 >= max(-low, high) * 0.999
    else:
        assert float(scale) * (255 - float(zero_point)) >= high - float(scale)
        assert -float(scale) * float(zero_point) <= low + float(scale)


@pytest.mark.parametrize("limit", [WEIGHT_LIMIT, REDUCED_LIMIT])
@given(values=hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**66), 2.0**66, width=32)))
def test_a_weight_is_off_by_at_most_half_its_scale_and_within_the_limit(limit: int, values: np.ndarray) -> None:
    for axis in (0, 1, None):
        codes, scale = quantize_weight(values, axis, limit=limit)
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max() <= limit
        assert (scale >= SMALLEST_SCALE).all()
        spread = scale if axis is None else scale.reshape((-1, 1) if axis == 0 else (1, -1))
        error = np.abs(codes * spread.astype(np.float64) - values)
        assert (error <= spread.astype(np.float64) * 0.5001).all()
