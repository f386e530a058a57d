"""Renaming names nodes after their modules; it changes nothing that is computed and no name that a caller gave."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from vlaopt.graph.check import check
from vlaopt.graph.naming import rename, tidy


def test_nodes_and_their_outputs_are_named_after_modules(build: Any, run: Any) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "val_7"], ["t_1"], name="n_1"),
        helper.make_node("Add", ["t_1", "head.bias"], ["t_2"], name="n_2"),
        helper.make_node("MatMul", ["t_2", "val_7"], ["y"], name="n_3"),
    ]
    model = build(nodes, {"val_7": np.eye(4, dtype=np.float32) * 2, "head.bias": np.ones(4, np.float32)})
    x = np.ones((1, 4), np.float32)
    before = run(model, {"x": x})["y"]
    result = rename(model, {"n_1": "head", "n_2": "head", "n_3": "head"})
    check(result)
    assert [node.name for node in result.graph.node] == ["head/MatMul", "head/Add", "head/MatMul_2"]
    assert [list(node.output) for node in result.graph.node] == [["head/MatMul"], ["head/Add"], ["y"]]
    assert [tensor.name for tensor in result.graph.initializer] == ["constant", "head.bias"]
    np.testing.assert_array_equal(run(result, {"x": x})["y"], before)


def test_a_name_that_the_caller_gave_is_not_taken_again(build: Any) -> None:
    nodes = [
        helper.make_node("Relu", ["head/Relu"], ["t"], name="n"),
        helper.make_node("Neg", ["t"], ["y"], name="m"),
    ]
    result = rename(build(nodes, x="head/Relu"), {"n": "head"})
    check(result)
    assert result.graph.node[0].output[0] == "head/Relu_2"


def test_what_a_branch_takes_from_outside_is_renamed_within_it(build: Any, run: Any) -> None:
    def branch(operator: str) -> Any:
        output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, (1, 4))
        return helper.make_graph([helper.make_node(operator, ["t"], ["inner"], name="i")], operator, [], [output])

    nodes = [
        helper.make_node("Neg", ["x"], ["t"], name="n"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("Abs"), else_branch=branch("Neg")),
    ]
    result = rename(build(nodes, {"c": np.array(True)}), {"n": "head"})
    check(result)
    np.testing.assert_array_equal(run(result, {"x": np.full((1, 4), 3, np.float32)})["y"], np.full((1, 4), 3))


def test_tidy_leaves_no_trace_of_who_wrote_the_graph(linear: Any) -> None:
    marked = linear()
    marked.graph.node[0].doc_string = "File '/home/somebody/model.py'"
    entry = marked.graph.node[0].metadata_props.add()
    entry.key, entry.value = "stack_trace", "/home/somebody"
    assert tidy(marked).SerializeToString() == tidy(linear()).SerializeToString()
    assert b"somebody" not in tidy(marked).SerializeToString()
