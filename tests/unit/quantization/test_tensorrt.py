"""What TensorRT's builder lets pass and computes wrongly, or refuses in words that help nobody, is found by rules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.quantization.structure import Fault
from vlaopt.quantization.tensorrt import UNSUPPORTED, tensorrt_faults

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def graph(nodes: list[NodeProto], kind: int, fixed: Mapping[str, np.ndarray], *, opset: int = 20) -> ModelProto:
    """A graph from x [1, 8] to y."""
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, (1, 8))],
        [helper.make_tensor_value_info("y", kind, (1, 8))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in fixed.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def norm(
    kind: int, *, centred: bool, square: str, quotient: str, wide: bool = False, shifted: bool = True
) -> ModelProto:
    """A norm in single operators; `wide`: its mean is computed in FP32."""
    dtype = np.float16 if kind == HALF else np.float32
    fixed = {"axes": np.array([-1]), "two": dtype(2), "epsilon": (np.float32 if wide else dtype)(1e-3)}
    nodes = []

    def add(operator: str, takes: list[str], gives: str, **attributes: int) -> str:
        nodes.append(helper.make_node(operator, takes, [gives], name=f"blocks.3.norm/{gives}", **attributes))
        return gives

    inner = add("Sub", ["x", add("ReduceMean", ["x", "axes"], "mean")], "inner") if centred else "x"
    squares = add(square, [inner, "two" if square == "Pow" else inner], "squares")
    squares = add("Cast", [squares], "wide squares", to=FLOAT) if wide else squares
    spread = add("ReduceMean", [squares, "axes"], "spread")
    spread = add("Add", ["epsilon", spread], "sum") if shifted else spread
    root = add("Sqrt", [spread], "root")
    root = add("Cast", [root], "narrow root", to=kind) if wide else root
    if quotient == "Div":
        add("Div", [inner, root], "y")
    else:
        add("Mul", [inner, add("Reciprocal", [root], "inverse")], "y")
    model = graph(nodes, kind, fixed)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("quotient", ["Div", "Reciprocal"])
@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_in_single_operators_is_found_in_half_precision_alone(
    centred: bool, square: str, quotient: str, shifted: bool
) -> None:
    given = {"centred": centred, "square": square, "quotient": quotient, "shifted": shifted}
    [fault] = tensorrt_faults(norm(HALF, **given))
    assert fault.node == "blocks.3.norm/squares"
    assert f"a {'LayerNorm' if centred else 'RMSNorm'} in single operators that computes in fp16" in fault.reason
    assert tensorrt_faults(norm(FLOAT, **given)) == []


def test_squares_in_half_precision_overflow_even_where_their_mean_is_fp32() -> None:
    assert tensorrt_faults(norm(HALF, centred=True, square="Pow", quotient="Div", wide=True))


def test_what_is_no_norm_is_left_alone() -> None:
    whole = helper.make_node("LayerNormalization", ["x", "scale"], ["y"], name="norm/LayerNormalization")
    assert tensorrt_faults(graph([whole], HALF, {"scale": np.ones(8, np.float16)})) == []
    cube = norm(HALF, centred=True, square="Pow", quotient="Div")
    two = next(tensor for tensor in cube.graph.initializer if tensor.name == "two")
    two.CopyFrom(numpy_helper.from_array(np.asarray(np.float16(3)), "two"))
    assert tensorrt_faults(cube) == []
    root = [helper.make_node("Sqrt", ["x"], ["r"], name="Sqrt"), helper.make_node("Div", ["x", "r"], ["y"], name="Div")]
    assert tensorrt_faults(graph(root, HALF, {})) == []


@pytest.mark.parametrize(
    ("operator", "fixed"),
    [
        ("Add", {"b": np.ones((1, 8), np.float32)}),
        ("MatMul", {"b": np.ones((8, 8), np.float32)}),
        ("LayerNormalization", {"b": np.ones(8, np.float32)}),
        ("Concat", {"b": np.ones((1, 8), np.float32)}),
    ],
)
def test_two_float_types_in_one_operator_are_found(operator: str, fixed: dict[str, np.ndarray]) -> None:
    attributes = {"axis": 1} if operator == "Concat" else {}
    node = helper.make_node(operator, ["x", "b"], ["y"], name=f"mix/{operator}", **attributes)
    expected = Fault(
        f"mix/{operator}", operator, "mixes fp16 ('x') and fp32 ('b'): TensorRT takes one type", "precision"
    )
    assert tensorrt_faults(graph([node], HALF, fixed)) == [expected]


def test_operands_of_which_each_may_have_its_own_type_may() -> None:
    power = helper.make_node("Pow", ["x", "b"], ["y"], name="Pow")
    assert tensorrt_faults(graph([power], HALF, {"b": np.float32(2)})) == []
    sizes = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="Resize")
    assert tensorrt_faults(graph([sizes], HALF, {"scales": np.ones(2, np.float32)})) == []
    grid = helper.make_node("GridSample", ["x", "grid"], ["y"], name="GridSample")
    assert [fault.node for fault in tensorrt_faults(graph([grid], HALF, {"grid": np.ones((1, 1, 2), np.float32)}))] == [
        "GridSample"
    ]


def test_an_operator_that_tensorrt_lacks_is_found_in_a_subgraph_too() -> None:
    inner = helper.make_graph(
        [helper.make_node("Unique", ["x"], ["u"], name="Unique")],
        "branch",
        [],
        [helper.make_tensor_value_info("u", FLOAT, None)],
    )
    node = helper.make_node("If", ["yes"], ["y"], name="If", then_branch=inner, else_branch=inner)
    faults = tensorrt_faults(graph([node], FLOAT, {"yes": np.bool_(True)}))
    assert {(fault.node, fault.cure) for fault in faults} == {("Unique", "operator")}


def test_the_operators_that_tensorrt_lacks_are_those_that_its_parser_names() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {name for name in UNSUPPORTED & standard if parser.supports_operator(name)} == set()
    assert {name for name in standard - UNSUPPORTED if not parser.supports_operator(name)} == set()
