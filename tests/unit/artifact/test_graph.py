"""What a graph holds is read from its bytes as onnx reads it, and damaged bytes are refused."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vlaopt.artifact.graph import Graph, GraphTensor, Node
from vlaopt.errors import InputError

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=300)
NODES = st.lists(
    st.tuples(NAMES, st.sampled_from(["Relu", "MatMul"]), st.lists(NAMES, max_size=3), st.lists(NAMES, max_size=2)),
    max_size=6,
)


def model_of(nodes: list[tuple[str, str, list[str], list[str]]]) -> onnx.ModelProto:
    made = [helper.make_node(kind, takes, gives, name=name, alpha=1.5) for name, kind, takes, gives in nodes]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [300], [0.5] * 300)
    return helper.make_model(helper.make_graph(made, "g", values[:1], values[1:], [weight]), producer_name="maker")


@settings(max_examples=40)
@given(nodes=NODES)
def test_nodes_are_what_onnx_reads(nodes):
    model = model_of(nodes)
    expected = tuple(Node(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in model.graph.node)
    assert Graph(model.SerializeToString()).nodes() == expected


def model_with(inputs: dict, outputs: dict, weights: list[onnx.TensorProto], nodes: list | None = None) -> Graph:
    def values(named: dict) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in named.items()]

    graph = helper.make_graph(nodes or [], "g", values(inputs), values(outputs), weights)
    return Graph(helper.make_model(graph).SerializeToString())


def test_inputs_and_outputs_have_names_types_and_named_dimensions():
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.5])
    graph = model_with(
        {"image": (TensorProto.UINT8, [1, 3]), "tokens": (TensorProto.INT64, ["length", None]), "w": (1, [1])},
        {"actions": (TensorProto.FLOAT16, [])},
        [weight],
    )
    assert graph.inputs() == (GraphTensor("image", "uint8", (1, 3)), GraphTensor("tokens", "int64", ("length", "")))
    assert graph.outputs() == (GraphTensor("actions", "float16", ()),)


def test_element_types_are_those_of_weights_constants_casts_and_ports():
    constant = helper.make_tensor("c", TensorProto.INT4, [2], [1, 2])
    nodes = [
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16, saturate=9),
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("Softmax", ["y"], ["z"], axis=TensorProto.FLOAT8E4M3FN),
    ]
    graph = model_with(
        {"x": (TensorProto.FLOAT, [2])},
        {"z": (TensorProto.FLOAT, [2])},
        [helper.make_tensor("w", TensorProto.INT8, [1], [3])],
        nodes,
    )
    assert graph.dtypes() == {"float32", "bfloat16", "int4", "int8"}


@pytest.mark.parametrize("read", ["inputs", "outputs", "dtypes"])
def test_a_graph_cut_inside_a_port_is_refused(read):
    whole = model_with({"x": (1, ["length"])}, {"y": (1, [2])}, []).model
    with pytest.raises(InputError, match="not an ONNX graph"):
        getattr(Graph(whole[: whole.index(b"length") + 3]), read)()


def test_bytes_that_are_cut_are_refused():
    whole = model_of([("a" * 200, "Relu", ["x"], ["y"])]).SerializeToString()
    for size in (len(whole) - 30, len(whole) // 2):
        with pytest.raises(InputError, match="not an ONNX graph"):
            Graph(whole[:size]).nodes()


def test_bytes_of_something_else_are_refused():
    with pytest.raises(InputError, match="not an ONNX graph"):
        Graph(b"\xff\xfe plain text").nodes()


def test_no_bytes_have_no_nodes():
    assert Graph(b"").nodes() == ()
