"""ONNX Runtime: what ran is what is reported."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions
from vlaopt.backends.onnxruntime import BACKEND, FILE, _eight_bit, reason_of
from vlaopt.backends.onnxruntime.kernels import Kernel, kernels_of
from vlaopt.errors import InputError

ONE_THREAD = EngineOptions(threads=1)


def test_every_matrix_layer_is_counted_by_the_precision_it_ran_in(graphs, quantized_graph):
    assert BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).precisions == {"fp32": 3}
    assert BACKEND.build(Graph(graphs["lstm"]), ONE_THREAD).precisions == {"fp32": 1}
    audited = BACKEND.build(Graph(quantized_graph(TensorProto.UINT8)), ONE_THREAD).precisions
    assert sum(audited.values()) == 2
    assert audited["int8"] >= 1


def test_the_file_holds_fused_nodes_that_load_on_any_cpu(graphs):
    file = BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).files[FILE]
    assert b"FusedConv" in file
    assert b"ReorderInput" not in file


def test_other_kernels_are_told_in_a_note(graphs):
    notes = BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).notes
    assert any("GlobalAveragePool" in note for note in notes)


def test_a_saved_graph_that_would_run_more_kernels_is_not_kept(quantized_graph):
    # HardSwish behind a DequantizeLinear: expanded in the saved file, each half gets a dequantizer of its own.
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"]),
        helper.make_node("HardSwish", ["x_dq"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "component",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]),
            helper.make_tensor("z", TensorProto.INT8, [], [0]),
        ],
    )
    given = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    engine = BACKEND.build(Graph(given), ONE_THREAD)
    assert engine.files[FILE] == given
    assert engine.notes[0].startswith("kept as given")


@pytest.mark.parametrize(
    ("operator", "types", "precision"),
    [
        ("Conv", ("float", "float"), "fp32"),
        ("Conv", ("float16", "float16"), "fp16"),
        ("QLinearConv", ("uint8", "float", "uint8", "int8"), "int8"),
        ("DynamicQuantizeLSTM", ("float", "int8"), "int8"),
        ("MatMulNBits", ("float", "uint8", "float"), "fp32"),
    ],
)
def test_a_kernel_is_int8_when_an_operand_is(operator, types, precision):
    assert Kernel("node", operator, "CPUExecutionProvider", types).precision == precision


def test_a_node_that_a_loop_repeats_counts_once():
    event = {
        "cat": "Node",
        "name": "loop/fc_kernel_time",
        "args": {
            "node_index": "3",
            "op_name": "Gemm",
            "provider": "CPUExecutionProvider",
            "input_type_shape": [{"float": [1, 8]}, {"float": [8, 8]}],
        },
    }
    assert kernels_of([event, event, {"cat": "Session", "name": "model_run"}]) == [
        Kernel("loop/fc", "Gemm", "CPUExecutionProvider", ("float", "float"))
    ]


def test_spinning_can_be_turned_off_and_nothing_else_said(graphs):
    files = BACKEND.build(Graph(graphs["lstm"]), ONE_THREAD).files
    session = BACKEND.open(files, EngineOptions(threads=2, settings={"spinning": False}))
    assert session.run({"sequence": np.zeros((5, 1, 4), np.float32)})["state"].shape == (1, 8)
    with pytest.raises(InputError, match="'spinning' is true or false, not 'no'"):
        BACKEND.open(files, EngineOptions(settings={"spinning": "no"}))


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Failed to load model.", "Failed to load model."),
        (
            "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/core/graph/model.cc:256 onnxruntime::Model::Model("
            "onnx::ModelProto&&, const onnxruntime::ModelOptions&) Unsupported model IR version: 99\n",
            "Unsupported model IR version: 99",
        ),
        ("Got invalid dimensions\n index: 3 Got: 95", "Got invalid dimensions index: 3 Got: 95"),
    ],
)
def test_a_message_is_told_on_one_line_without_its_c_plus_plus(raised, told):
    assert reason_of(RuntimeError(raised)) == told


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        (("Conv", "DequantizeLinear"), False),
        (("DequantizeLinear", "QuantizeLinear"), True),
        (("QuantizeLinear",), True),
        (("DynamicQuantizeLinear",), True),
        (("QLinearConv",), True),
        (("MatMulInteger",), True),
        ((), False),
    ],
)
def test_a_graph_computes_in_8_bit_by_its_operators(operators: tuple[str, ...], expected: bool) -> None:
    nodes = [helper.make_node(operator, ["x"], ["y"]) for operator in operators]
    assert _eight_bit(helper.make_model(helper.make_graph(nodes, "g", [], [])).SerializeToString()) is expected


def two_cameras(weight: np.ndarray) -> bytes:
    """Two convolutions of symmetric int8 activations that share their weight, as TensorRT wants it."""
    nodes = []
    for camera in ("left", "right"):
        nodes += [
            helper.make_node("QuantizeLinear", [camera, "s", "z"], [f"{camera}_q"]),
            helper.make_node("DequantizeLinear", [f"{camera}_q", "s", "z"], [f"{camera}_dq"]),
        ]
    nodes.append(helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["w_dq"], axis=0))
    nodes += [helper.make_node("Conv", [f"{name}_dq", "w_dq"], [f"{name}_y"]) for name in ("left", "right")]
    graph = helper.make_graph(
        nodes,
        "component",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 4, 4]) for name in ("left", "right")],
        [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [1, 8, 4, 4]) for name in ("left", "right")],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [0.01]),
            helper.make_tensor("z", TensorProto.INT8, [], [0]),
            helper.make_tensor("w", TensorProto.INT8, weight.shape, weight.tobytes(), raw=True),
            helper.make_tensor("ws", TensorProto.FLOAT, [8], [0.01] * 8),
            helper.make_tensor("wz", TensorProto.INT8, [8], [0] * 8),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def test_int8_layers_that_share_their_weight_are_opened_and_exact(capfd):
    """ONNX Runtime 1.31 fails on them with its optimisers for x86, as on the ACT of two cameras."""
    weight = np.full((8, 8, 1, 1), 127, np.int8)
    session = BACKEND.open({FILE: two_cameras(weight)}, ONE_THREAD)
    image = np.full((1, 8, 4, 4), 1.27, np.float32)
    found = session.run({"left": image, "right": -image})
    assert np.allclose(found["left_y"], 8 * 1.27 * 1.27)
    assert np.allclose(found["right_y"], -8 * 1.27 * 1.27)
    assert capfd.readouterr().err == ""
