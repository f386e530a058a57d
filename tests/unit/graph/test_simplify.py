"""Simplification gives fewer nodes, the same values, the same names, and equal bytes for equal graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxsim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

from vlaopt.errors import StageError
from vlaopt.graph.simplify import simplify
from vlaopt.graph.topology import constants


@pytest.fixture
def convolution(build: Any) -> ModelProto:
    """Convolution with a batch norm behind it and weights that only constant folding makes constant."""
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], name="stem.0/Transpose", perm=[1, 0, 2, 3]),
        helper.make_node("Conv", ["x", "wt"], ["c"], name="stem.0/Conv", pads=[1, 1, 1, 1]),
        helper.make_node(
            "BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], name="stem.1/BatchNormalization", epsilon=1e-3
        ),
        helper.make_node("Identity", ["n"], ["i"], name="stem.2/Identity"),
        helper.make_node("HardSwish", ["i"], ["y"], name="stem.2/HardSwish"),
    ]
    values = {name: generator.uniform(0.5, 1.5, 4).astype(np.float32) for name in "gbmv"}
    values["w"] = generator.normal(size=(4, 4, 3, 3)).astype(np.float32)
    model: ModelProto = build(nodes, values, shape=(1, 4, 6, 6))
    return model


def test_the_graph_computes_the_same_with_fewer_nodes(convolution: ModelProto, run: Any) -> None:
    before = convolution.SerializeToString()
    result = simplify(convolution)
    assert [node.op_type for node in result.graph.node] == ["Conv", "HardSwish"]
    assert result.graph.node[0].name == "stem.0/Conv"
    assert result.graph.node[0].input[1] in constants(result.graph)
    x = np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(result, {"x": x})["y"], run(convolution, {"x": x})["y"], atol=1e-5)
    assert convolution.SerializeToString() == before


def test_what_a_rewrite_makes_says_the_module_that_it_stands_for(build: Any, run: Any) -> None:
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="model.head/MatMul"),
        helper.make_node("Add", ["m", "b"], ["a"], name="model.head/Add"),
        helper.make_node("Relu", ["a"], ["y"], name="model/Relu"),
    ]
    values = {"w": generator.normal(size=(8, 8)).astype(np.float32), "b": generator.normal(size=8).astype(np.float32)}
    model = build(nodes, values, shape=(1, 3, 8))
    result = simplify(model)
    [product] = [node for node in result.graph.node if node.op_type == "Gemm"]
    assert product.name == "model.head/Gemm"
    assert all(node.name.startswith("model") for node in result.graph.node)
    assert simplify(result).SerializeToString(deterministic=True) == result.SerializeToString(deterministic=True)


def test_products_that_become_one_belong_to_the_module_around_them(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: np.full((4, 4), at, np.float32) for at, name in enumerate("qk")}
    ends = [helper.make_node("Add", ["mq", "mk"], ["y"], name="block.attn/Add")]
    apart = [helper.make_node("MatMul", ["x", name], [f"m{name}"], name=f"block.attn.{name}/MatMul") for name in "qk"]
    merged = [
        helper.make_node("MatMul", ["x", "qk"], ["both"], name="MatMul_0"),
        helper.make_node("Split", ["both"], ["sq", "sk"], name="Split_1", axis=1, num_outputs=2),
        helper.make_node("Relu", ["sq"], ["mq"], name="Relu_2"),
        helper.make_node("Relu", ["sk"], ["mk"], name="Relu_3"),
    ]
    rewritten = build([*merged, *ends], {"qk": np.concatenate([*weights.values()], axis=1)})
    monkeypatch.setattr(onnxsim, "simplify", lambda model, check_n: (rewritten, True))
    names = [node.name for node in simplify(build([*apart, *ends], weights)).graph.node]
    attention = ["block.attn/MatMul", "block.attn/Split"]
    assert names == [*attention, "block.attn.q/Relu", "block.attn.k/Relu", "block.attn/Add"]


def test_simplifying_twice_changes_nothing(convolution: ModelProto) -> None:
    once = simplify(convolution)
    assert simplify(once).SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


def test_layer_normalization_stays_whole(build: Any) -> None:
    node = helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], name="norm/LayerNormalization")
    ones = np.ones(4, np.float32)
    assert [node.op_type for node in simplify(build([node], {"g": ones, "b": ones})).graph.node] == [
        "LayerNormalization"
    ]


@settings(max_examples=20)
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12))
def test_any_tensor_name_survives(name: str) -> None:
    from onnx import TensorProto

    node = helper.make_node("Relu", [name], [name + "'"], name="Relu")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4)) for n in (name, name + "'")]
    body = helper.make_graph([node], "test", values[:1], values[1:])
    result = simplify(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert [value.name for value in (*result.graph.input, *result.graph.output)] == [name, name + "'"]


def test_a_result_that_is_not_valid_is_an_error(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = linear()
    broken.graph.initializer[0].dims[0] = 3
    monkeypatch.setattr(onnxsim, "simplify", lambda model, check_n: (broken, True))
    with pytest.raises(StageError, match="simplified into a graph that is"):
        simplify(linear())


def test_a_result_with_other_outputs_is_an_error(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxsim, "simplify", lambda model, check_n: (linear(y="z"), True))
    with pytest.raises(StageError, match="changed the outputs"):
        simplify(linear())
