"""A graph that its backend would misread is refused by node; NVIDIA's own builder takes what is not refused."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from vlaopt.artifact.graph import Graph
from vlaopt.errors import StageError
from vlaopt.quantization.placement import write_qdq
from vlaopt.quantization.plan import ComponentPlan, component_plan, plan_nodes
from vlaopt.quantization.structure import quantized_layers, structural_check


@pytest.fixture
def quantized(network: ModelProto, plan: ComponentPlan) -> ModelProto:
    return write_qdq(network, plan, placement="tensorrt")


def node(model: ModelProto, name: str) -> NodeProto:
    return next(entry for entry in model.graph.node if entry.name == name)


def put(model: ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(entry for entry in model.graph.initializer if entry.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_not_a_positive_number_is_refused(quantized: ModelProto, scale: float) -> None:
    put(quantized, "h_scale", np.array(scale, np.float32))
    with pytest.raises(StageError, match="'h_quantized/QuantizeLinear' has a scale that is not a positive number"):
        structural_check(quantized, "tensorrt")


def test_a_zero_point_is_refused(quantized: ModelProto) -> None:
    put(quantized, "h_zero_point", np.array(3, np.int8))
    with pytest.raises(StageError, match="has a zero point other than 0"):
        structural_check(quantized, "tensorrt")


def test_a_quantizer_without_zero_point_is_uint8_and_refused(quantized: ModelProto) -> None:
    del node(quantized, "h_quantized/QuantizeLinear").input[2:]
    with pytest.raises(StageError, match="is uint8 where int8 or float8e4m3fn is needed"):
        structural_check(quantized, "tensorrt")


def test_a_quantizer_that_nobody_takes_is_refused(quantized: ModelProto) -> None:
    quantized.graph.node.append(
        helper.make_node("QuantizeLinear", ["y", "h_scale", "h_zero_point"], ["lost"], name="lost/QuantizeLinear")
    )
    with pytest.raises(StageError, match="'lost/QuantizeLinear' is not followed by dequantizers alone"):
        structural_check(quantized, "tensorrt")


def test_a_dequantizer_that_nobody_takes_is_refused(quantized: ModelProto) -> None:
    node(quantized, "stem/Conv").input[0] = "image in"
    with pytest.raises(StageError, match="'image in_dequantized/DequantizeLinear' is not used"):
        structural_check(quantized, "tensorrt")


def test_scales_along_another_axis_are_refused(quantized: ModelProto) -> None:
    node(quantized, "stem.weight_dequantized/DequantizeLinear").attribute[0].i = 1
    with pytest.raises(StageError, match="has its scales along axis 1, Conv needs axis 0"):
        structural_check(quantized, "tensorrt")


def test_scales_per_channel_on_an_activation_are_refused(quantized: ModelProto) -> None:
    put(quantized, "h_scale", np.ones(8, np.float32))
    put(quantized, "h_zero_point", np.zeros(8, np.int8))
    with pytest.raises(StageError, match="has scales per channel on an activation"):
        structural_check(quantized, "tensorrt")


def test_an_int32_bias_is_refused_for_tensorrt(network: ModelProto, plan: ComponentPlan, quantized: ModelProto) -> None:
    for name, value in (("bias_codes", np.zeros(8, np.int32)), ("bias_scale", np.ones(8, np.float32))):
        quantized.graph.initializer.append(numpy_helper.from_array(value, name))
    bias = helper.make_node(
        "DequantizeLinear", ["bias_codes", "bias_scale"], ["bias"], name="bias/DequantizeLinear", axis=0
    )
    quantized.graph.node.insert(0, bias)
    node(quantized, "stem/Conv").input[2] = "bias"
    with pytest.raises(StageError, match="'bias/DequantizeLinear' makes an int32 bias"):
        structural_check(quantized, "tensorrt")


def test_an_unquantized_graph_has_no_quantized_layers(network: ModelProto) -> None:
    structural_check(network, "tensorrt")
    assert quantized_layers(network) == []


def test_nvidias_builder_takes_the_int8_form(quantized: ModelProto, recurrent: ModelProto) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    nodes = plan_nodes({"vision": recurrent}, scheme="int8", rules=[("vision", "int8-weights")])["vision"]
    stored = write_qdq(recurrent, component_plan(Graph(b""), nodes, {}), placement="tensorrt")
    for model in (quantized, stored):
        structural_check(model, "tensorrt")
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(model.SerializeToString()), parser.get_error(0)
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        assert builder.build_serialized_network(network, config) is not None
