"""A graph's nodes are read from its bytes as onnx reads them, and damaged bytes are refused."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vlaopt.artifact.graph import Graph, Node
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
