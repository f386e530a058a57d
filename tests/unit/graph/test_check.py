"""A graph that vlaopt cannot work on is refused by the name of the node or tensor that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from vlaopt.artifact.graph import Graph
from vlaopt.errors import InputError
from vlaopt.graph.check import OPSETS, RANDOM_OPERATORS, check, load


def test_a_valid_graph_passes_and_loads_back(linear: Any) -> None:
    model = linear()
    check(model)
    assert load(Graph(model.SerializeToString())) == model


def test_a_graph_cut_at_any_percent_is_refused(linear: Any) -> None:
    data = linear().SerializeToString()
    for percent in range(100):
        with pytest.raises(InputError, match=r"not (an|valid) ONNX|IR version|opset"):
            load(Graph(data[: len(data) * percent // 100]), where="vision.onnx")


@pytest.mark.parametrize("opset", [9, 17, OPSETS[-1] + 1, 99])
def test_an_opset_outside_the_range_is_refused(linear: Any, opset: int) -> None:
    with pytest.raises(InputError, match=f"opset {opset} is not one of 18 to 24"):
        check(linear(opsets={"": opset}))


def test_a_newer_ir_is_refused(linear: Any) -> None:
    model = linear()
    model.ir_version = 99
    with pytest.raises(InputError, match="IR version 99 is newer"):
        check(model)


def test_an_unknown_domain_is_refused_unless_taken(build: Any) -> None:
    model = build(
        [helper.make_node("Swish", ["x"], ["y"], name="stem/Swish", domain="com.acme")], opsets={"": 20, "com.acme": 1}
    )
    with pytest.raises(InputError, match=r"node 'stem/Swish' \(Swish\) is of the domain 'com.acme'"):
        check(model)
    check(model, domains=("", "com.acme"))


def test_an_unknown_operator_is_refused(build: Any) -> None:
    with pytest.raises(InputError, match="Frobnicate"):
        check(build([helper.make_node("Frobnicate", ["x"], ["y"], name="stem/Frobnicate")]))


@pytest.mark.parametrize("operator", sorted(RANDOM_OPERATORS))
def test_a_random_operator_is_refused_by_name(build: Any, operator: str) -> None:
    with pytest.raises(InputError, match=f"node 'noise/{operator}' .* draws random numbers"):
        check(build([helper.make_node(operator, ["x"], ["y"], name=f"noise/{operator}")]))


def test_a_random_operator_inside_a_branch_is_found(build: Any) -> None:
    output = helper.make_tensor_value_info("branch", TensorProto.FLOAT, (1, 4))
    random = helper.make_node("RandomNormal", [], ["branch"], name="hidden/RandomNormal", shape=[1, 4])
    branch = helper.make_graph([random], "branch", [], [output])
    node = helper.make_node("If", ["condition"], ["y"], name="If", then_branch=branch, else_branch=branch)
    with pytest.raises(InputError, match="hidden/RandomNormal"):
        check(build([node], {"condition": np.array(True)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(linear: Any, value: float) -> None:
    weight = np.eye(4, dtype=np.float32)
    weight[1, 2] = value
    with pytest.raises(InputError, match="initializer 'w' has 1 of 16 values that are NaN or infinite"):
        check(linear(weight))


def test_the_infinities_of_an_attention_mask_pass(build: Any) -> None:
    mask = np.array([[0.0, 0.0, -np.inf, -np.inf]], np.float32)
    check(build([helper.make_node("Add", ["x", "mask"], ["y"], name="Add")], {"mask": mask}))
    lowest = np.array(-np.inf, np.float32)
    check(build([helper.make_node("Max", ["x", "lowest"], ["y"], name="Max")], {"lowest": lowest}))


def test_a_not_finite_value_in_a_constant_node_is_found(build: Any) -> None:
    value = helper.make_tensor("value", TensorProto.FLOAT, (2,), [1.0, float("nan")])
    nodes = [
        helper.make_node("Constant", [], ["c"], name="scale/Constant", value=value),
        helper.make_node("Identity", ["x"], ["y"], name="Identity"),
    ]
    with pytest.raises(InputError, match="scale/Constant"):
        check(build(nodes))


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd"])
def test_external_data_is_refused_before_it_is_read(linear: Any, location: str) -> None:
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    with pytest.raises(InputError, match="initializer 'w' is stored outside the graph"):
        check(model)


def test_shapes_that_contradict_each_other_are_refused(linear: Any) -> None:
    with pytest.raises(InputError, match="not valid ONNX"):
        check(linear(np.eye(3, dtype=np.float32)))


@pytest.mark.parametrize("name", ["a/b.c", "two words", "🤖 camera", "-dash", "名"])
def test_any_name_is_taken(linear: Any, name: str) -> None:
    model = linear(x=name, y=name + "'")
    assert load(Graph(model.SerializeToString())).graph.input[0].name == name
