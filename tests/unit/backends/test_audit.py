"""The audit: kernels are found behind their nodes, and no layer that does not run as planned stays unnamed."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, get
from vlaopt.backends.audit import MATRIX_OPERATORS, UNKNOWN, audit, by_node, planned_precisions

ONE_THREAD = EngineOptions(threads=1)
LAYERS = {"conv": {"stem/conv", "block/conv", "head/fc"}, "int8": {"stem/conv", "head/fc"}, "lstm": {"memory/lstm"}}
NAMES = st.sampled_from("abcdef")
PRECISIONS = st.sampled_from(["int8", "fp32", UNKNOWN])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("graph", "precision"), [("conv", "fp32"), ("int8", "int8")])
def test_every_matrix_layer_is_named_with_what_it_runs_in(graphs, quantized_graph, backend, graph, precision):
    kind = TensorProto.UINT8 if backend == "onnxruntime" else TensorProto.INT8
    model = quantized_graph(kind) if graph == "int8" else graphs[graph]
    assert get(backend).build(Graph(model), ONE_THREAD).layers == dict.fromkeys(LAYERS[graph], precision)


def test_an_lstm_is_named_by_onnx_runtime_and_counted_by_openvino(graphs):
    assert get("onnxruntime").build(Graph(graphs["lstm"]), ONE_THREAD).layers == {"memory/lstm": "fp32"}
    engine = get("openvino").build(Graph(graphs["lstm"]), ONE_THREAD)
    assert (dict(engine.precisions), dict(engine.layers)) == ({"fp32": 1}, {})


def chain() -> Graph:
    """Products, one behind another, with activations between."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one/MatMul"),
        helper.make_node("Relu", ["a"], ["b"], name="one.act/Relu"),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="one/MatMul_2"),
        helper.make_node("Sigmoid", ["c"], ["d"], name="gate/Sigmoid"),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="last/MatMul"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.5] * 16)
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [weight]))
    return Graph(model.SerializeToString())


@pytest.mark.parametrize(
    ("kernel", "node"),
    [
        ("one/MatMul", "one/MatMul"),
        ("one/MatMul_token_12", "one/MatMul"),
        ("one/MatMul_2_token_3", "one/MatMul_2"),
        ("one/MatMul_2/WithoutBiases/DequantizationMultiply", "one/MatMul_2"),
        ("one.act/Relu_nchwc", "one/MatMul"),
        ("gate/Sigmoid", "one/MatMul_2"),
        ("y", "last/MatMul"),
    ],
)
def test_a_kernel_is_found_by_the_names_that_backends_give_it(kernel, node):
    assert by_node(chain().nodes(), [((kernel,), "int8")]) == {node: "int8"}


def test_a_kernel_of_no_node_names_none():
    assert by_node(chain().nodes(), [(("somewhere/MatMul",), "int8"), (("x",), "int8"), ((), "int8")]) == {}


def test_a_node_that_is_named_itself_is_not_taken_for_the_one_in_front_of_an_activation():
    kernels = [(("one.act/Relu",), "fp32"), (("one/MatMul",), "int8")]
    assert by_node(chain().nodes(), kernels) == {"one/MatMul": "int8"}


@given(planned=st.dictionaries(NAMES, st.just("int8")), runs=st.dictionaries(NAMES, PRECISIONS))
def test_whatever_runs_otherwise_is_named_and_nothing_else(planned, runs):
    counts = {"int8": sum(kind == "int8" for kind in runs.values())}
    others = audit(planned, runs, counts).others
    assert others == {node: runs.get(node, UNKNOWN) for node in planned if runs.get(node) != "int8"}


@given(planned=st.integers(0, 9), counted=st.integers(0, 9))
def test_a_backend_that_only_counts_is_held_to_its_counts(planned, counted):
    found = audit({f"layer {at}": "int8" for at in range(planned)}, {}, {"int8": counted, "fp32": 3})
    assert len(found.others) == max(0, planned - counted)
    assert found.to_json()["kept"] == min(planned, counted)


def test_the_line_names_backend_component_layers_and_both_precisions():
    planned = dict.fromkeys(["project/Gemm", *(f"blocks.{at}/Conv" for at in range(8)), "MatMul"], "int8")
    layers = {**dict.fromkeys(planned, "fp32"), "blocks.0/Conv": "int8"}
    del layers["MatMul"]
    told = audit(planned, layers, {"int8": 1}).told("openvino", "vision")
    assert told == (
        "openvino runs 9 of 10 layers of vision in fp32 or unknown precision that were planned in int8: "
        "vision.project, vision.blocks.1, vision.blocks.2, vision.blocks.3, vision.blocks.4, vision.blocks.5 and 3 more"
    )


def test_only_products_that_compute_in_low_precision_are_planned():
    nodes = {
        "a/Gemm": {"operator": "Gemm", "scheme": "int8-dynamic"},
        "b/Gemm": {"operator": "Gemm", "scheme": "fp32"},
        "c/Gather": {"operator": "Gather", "scheme": "int8-weights"},
        "d/Add": {"operator": "Add", "scheme": "int8"},
        "e/LSTM": {"operator": "LSTM", "scheme": "int8-weights"},
    }
    assert planned_precisions(nodes) == {"a/Gemm": "int8"}


def test_matrix_operators_are_operators_of_onnx():
    assert all(onnx.defs.has(operator) for operator in MATRIX_OPERATORS)
