"""A newer opset is the same graph: names, weights and numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vlaopt.errors import StageError
from vlaopt.graph.opset import raised


@pytest.fixture
def model() -> ModelProto:
    weight = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["c"], name="stem/Conv"),
        helper.make_node("HardSwish", ["c"], ["h"], name="stem/HardSwish"),
        helper.make_node("ReduceMean", ["h", "axes"], ["y"], name="pool/ReduceMean", keepdims=0),
    ]
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 3))],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_names_weights_and_results_stay(model: ModelProto, opset: int) -> None:
    result = raised(model, opset)
    onnx.checker.check_model(result, full_check=True)
    assert result.opset_import[0].version == opset
    assert [node.name for node in result.graph.node] == [node.name for node in model.graph.node]
    assert list(result.graph.initializer) == list(model.graph.initializer)
    assert [value.name for value in result.graph.input] == ["x"]
    feed = {"x": np.random.default_rng(1).normal(size=(1, 3, 4, 4)).astype(np.float32)}
    outputs = [onnxruntime.InferenceSession(one.SerializeToString()).run(None, feed)[0] for one in (model, result)]
    assert np.array_equal(*outputs)


def test_what_is_new_enough_is_left_alone(model: ModelProto) -> None:
    assert raised(model, 20) is model
    assert raised(model, 18) is model


def test_what_the_converter_cannot_raise_is_an_error(model: ModelProto) -> None:
    model.graph.node[1].op_type = "Mystery"
    with pytest.raises(StageError, match="opset 20 cannot be raised to 22"):
        raised(model, 22)
