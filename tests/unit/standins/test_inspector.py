"""The inspector tells of each lane in its form, and of precision what the graph really holds."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.standins import LANES, installed
from tests.unit.backends.conftest import conv_net, quantized, quantized_net, serialise, weight
from tests.unit.standins.test_engine import Built

PRODUCTS = ("CaskConvolution", "gemm")


def products(told: dict[str, Any]) -> dict[str, str]:
    """The kinds of weights by the ONNX nodes that the metadata names."""
    found = {}
    for layer in told["Layers"]:
        if layer["LayerType"] in PRODUCTS:
            found |= dict.fromkeys(nodes(layer), layer["Weights"]["Type"])
    return found


def nodes(layer: dict[str, Any]) -> list[str]:
    return re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer["Metadata"])


@pytest.mark.parametrize("lane", LANES)
def test_each_lane_has_its_form(lane):
    with installed(lane) as trt:
        told = Built(trt, quantized_net()).inspect()
    assert ("Bindings" in told) == (lane != "11.4")
    if lane == "11.4":
        modes = [(tensor["Name"], tensor["IOMode"], tensor["DataType"]) for tensor in told["I/O Tensors"]]
        assert modes == [("image", "Input", "Float"), ("features", "Output", "Float")]
    else:
        assert told["Bindings"] == ["image", "features"]
    assert {"Name", "LayerType", "Inputs", "Outputs", "TacticName", "Metadata"} <= set(told["Layers"][0])
    formats = {tensor["Format/Datatype"] for layer in told["Layers"] for tensor in layer["Inputs"]}
    assert ("Int8" in formats) and (("Row major linear FP32" in formats) == (lane != "11.4"))


@pytest.mark.parametrize("lane", LANES)
def test_int8_is_told_where_both_operands_are_dequantized(lane):
    with installed(lane) as trt:
        found = products(Built(trt, quantized_net()).inspect())
        assert (found["stem/conv"], found["head/fc"]) == ("Int8", "Int8")
        plain = products(Built(trt, conv_net()).inspect())
        assert set(plain.values()) == {"Float"}


def test_a_bias_an_activation_and_q_dq_vanish_into_their_product():
    with installed("10.3") as trt:
        layers = Built(trt, quantized_net()).inspect()["Layers"]
    (conv,) = [layer for layer in layers if layer["LayerType"] == "CaskConvolution"]
    assert set(nodes(conv)) == {"image/dq", "k/q", "k/dq", "stem/conv", "stem/relu", "r/q"}
    assert conv["Name"].startswith("k + ")
    assert " + stem/conv + stem/relu" in conv["Name"]
    assert conv["Weights"] == {"Type": "Int8", "Count": 16 * 3 * 3 * 3}
    assert "i8i8_i8i32" in conv["TacticName"]
    lone = {tuple(nodes(layer)) for layer in layers if layer["LayerType"] == "Reformat"}
    assert ("image/q",) in lone


def test_fp16_and_fp8_are_told():
    half = [
        helper.make_node("Cast", ["x"], ["h"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["p"], name="product"),
        helper.make_node("Cast", ["p"], ["y"], name="back", to=TensorProto.FLOAT),
    ]
    weights = {"w": numpy_helper.from_array(weight(4, 4, seed=1).astype(np.float16), "w")}
    with installed("10.16", sm="8.9") as trt:
        assert products(Built(trt, serialise(half, {"x": [4, 4]}, {"y": [4, 4]}, weights)).inspect()) == {
            "product": "Half"
        }
        eight = products(Built(trt, quantized_net(TensorProto.FLOAT8E4M3FN)).inspect())
        assert (eight["stem/conv"], eight["head/fc"]) == ("FP8", "FP8")


def test_weak_typing_takes_what_its_flags_allow():
    with installed("10.3") as trt:
        assert set(products(Built(trt, conv_net(), strong=False).inspect()).values()) == {"Float"}
        assert set(products(Built(trt, conv_net(), strong=False, flags=["FP16"]).inspect()).values()) == {"Half"}
        both = products(Built(trt, quantized_net(), strong=False, flags=["FP16", "INT8"]).inspect())
        assert both["stem/conv"] == "Int8"


def test_without_detailed_profiling_there_are_only_names():
    with installed("11.4") as trt:
        told = Built(trt, quantized_net(), verbosity="LAYER_NAMES_ONLY").inspect()
        assert told["ProfilingVerbosity"] == "LAYER_NAMES_ONLY"
        assert all(isinstance(layer, str) for layer in told["Layers"])
        assert Built(trt, quantized_net(), verbosity="NONE").inspect()["Layers"] == []


@pytest.mark.parametrize("lane", LANES)
def test_ignored_precision_is_told_as_fp32_everywhere(lane):
    with installed(lane, faults=["ignores-precision"]) as trt:
        built = Built(trt, quantized_net())
        told = built.inspect()
    assert set(products(told).values()) == {"Float"}
    assert "Int8" not in json.dumps(told)


def test_layers_that_only_move_data_stand_before_and_behind_low_precision():
    nodes_of = [
        helper.make_node("Cast", ["x"], ["h"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["x16", "k"], ["y"], name="conv"),
    ]
    graph = helper.make_graph(
        nodes_of[1:],
        "half",
        [helper.make_tensor_value_info("x16", TensorProto.FLOAT16, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 4, 6, 6])],
        [numpy_helper.from_array(weight(4, 3, 3, 3, seed=2).astype(np.float16), "k")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    with installed("10.13") as trt:
        names = [layer["Name"] for layer in Built(trt, model).inspect()["Layers"]]
    assert names[0] == "Reformatting CopyNode for Input Tensor 0 to conv"
    assert names[-1] == "Reformatting CopyNode for Output Tensor 0 to conv"


def test_int8_weights_take_a_quarter_of_the_memory():
    with installed("11.4") as trt:
        plain, small = (
            Built(trt, graph).load().get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
            for graph in (conv_net(), quantized_net())
        )
        assert small < plain / 2
        assert trt.EngineStat.TOTAL_WEIGHTS_SIZE.name == "TOTAL_WEIGHTS_SIZE"


def test_a_residual_sum_with_a_quantized_skip_is_done_by_its_convolution():
    nodes_of = [
        *quantized("image", "zero"),
        *quantized("k", "zero"),
        helper.make_node("Conv", ["image_dq", "k_dq"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Add", ["c", "image_dq"], ["s"], name="sum"),
        helper.make_node("Relu", ["s"], ["y"], name="relu"),
    ]
    weights = {
        "k": weight(3, 3, 3, 3, seed=2),
        "zero": np.int8(0),
        "image_s": np.float32(0.03),
        "k_s": np.float32(0.01),
    }
    graph = serialise(nodes_of, {"image": [1, 3, 8, 8]}, {"y": [1, 3, 8, 8]}, weights)
    with installed("10.13") as trt:
        layers = Built(trt, graph).inspect()["Layers"]
    (conv,) = [layer for layer in layers if layer["LayerType"] == "CaskConvolution"]
    assert {"image/dq", "conv", "sum", "relu"} <= set(nodes(conv))
    assert not [layer for layer in layers if layer["Name"] == "image/dq"]
