"""OpenVINO: the precision that was asked for, and reasons a person can read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import openvino
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vlaopt.artifact.graph import MARK, Graph, Node
from vlaopt.backends import EngineOptions, Resident
from vlaopt.backends.openvino import BACKEND, LENT_FROM
from vlaopt.backends.openvino.ir import BIN, XML, reason
from vlaopt.backends.openvino.layers import Layer, fused_precisions
from vlaopt.benchmark.environment import cpu_features
from vlaopt.errors import EnvironmentProblem, InputError

ONE_THREAD = EngineOptions(threads=1)
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_fp32_stays_fp32_on_a_cpu_that_would_take_bf16(graphs):
    assert BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).precisions == {"fp32": 3}
    assert BACKEND.build(Graph(graphs["lstm"]), ONE_THREAD).precisions == {"fp32": 1}


def test_quantized_layers_are_counted_as_int8(graphs):
    assert BACKEND.build(Graph(graphs["int8"]), ONE_THREAD).precisions == {"int8": 2}


@pytest.mark.skipif(not HAS_BF16, reason="this CPU does not calculate in bf16")
def test_marked_nodes_compute_in_bf16_and_the_others_in_fp32(graphs):
    engine = BACKEND.build(marked(graphs["conv"], "bf16", every=2), ONE_THREAD)
    nodes = marked(graphs["conv"], "bf16", every=2).nodes()
    wanted = {node.name: node.computes_in or "fp32" for node in nodes}
    assert {*engine.layers.values()} == {"bf16", "fp32"}
    assert engine.layers == {name: wanted[name] for name in engine.layers}
    assert engine.facts == {"computes_in": "bf16"}
    again = BACKEND.open(engine.files, ONE_THREAD)
    feeds = {port.name: np.ones(port.shape, port.dtype) for port in again.inputs}
    exact = BACKEND.open(BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).files, ONE_THREAD).run(feeds)
    assert all(0 < np.abs(value - exact[name]).max() < 0.1 for name, value in again.run(feeds).items())


def marked(model: bytes, half: str, *, every: int = 1) -> Graph:
    """The graph with a mark on each `every`th of its convolutions and products."""
    changed = ModelProto.FromString(model)
    layers = [node for node in changed.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    for node in layers[::every]:
        node.metadata_props.add(key=MARK, value=half)
    return Graph(changed.SerializeToString())


@pytest.mark.skipif(not HAS_BF16, reason="this CPU does not calculate in bf16")
def test_what_is_not_marked_stays_exact_with_its_bias_too():
    rng = np.random.default_rng(0)
    shapes = {"v": (512, 512), "w": (512, 512), "b": (512,), "z": (512, 512)}
    stored = [numpy_helper.from_array(rng.standard_normal(shapes[name]).astype(np.float32), name) for name in shapes]
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], name="first/MatMul"),
        helper.make_node("Gemm", ["h", "w", "b"], ["m"], name="exact/Gemm", transB=1),
        helper.make_node("Transpose", ["m"], ["s"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["s", "z"], ["y"], name="last/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "component",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [512, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512, 512])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    for node in (model.graph.node[0], model.graph.node[-1]):
        node.metadata_props.add(key=MARK, value="bf16")
    engine = BACKEND.build(Graph(model.SerializeToString()), ONE_THREAD)
    assert engine.layers == {"first/MatMul": "bf16", "exact/Gemm": "fp32", "last/MatMul": "bf16"}


def test_two_halves_in_one_graph_are_refused(graphs):
    changed = ModelProto.FromString(marked(graphs["conv"], "bf16", every=2).model)
    changed.graph.node[-1].metadata_props.add(key=MARK, value="fp16")
    with pytest.raises(InputError, match="one type beside FP32, and nodes are marked for bf16 and fp16"):
        BACKEND.build(Graph(changed.SerializeToString()), ONE_THREAD)


def test_a_precision_that_the_cpu_lacks_is_an_error_not_a_fallback(graphs, monkeypatch):
    monkeypatch.setattr(openvino.Core, "get_property", lambda self, device, name: ["FP32", "INT8"])
    with pytest.raises(EnvironmentProblem, match="this CPU does not calculate in bf16"):
        BACKEND.build(marked(graphs["conv"], "bf16"), ONE_THREAD)


def test_there_are_no_settings(graphs):
    with pytest.raises(InputError, match="unknown openvino setting 'precision'"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions(settings={"precision": "bf16"}))


def test_weights_are_not_compressed(graphs):
    files = BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).files
    assert set(files) == {XML, BIN}
    assert len(files[BIN]) >= 4 * (16 * 27 + 16 * 9 + 16 * 4)


def test_a_dynamic_dimension_takes_several_sizes():
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "component",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    session = BACKEND.open(BACKEND.build(Graph(model), ONE_THREAD).files, ONE_THREAD)
    assert session.inputs[0].shape == (-1, 4)
    for batch in (1, 3):
        assert session.run({"x": np.full((batch, 4), -1, np.float32)})["y"].shape == (batch, 4)


def test_products_fused_into_attention_are_told_and_not_counted():
    rng = np.random.default_rng(0)
    names = ["q", "k", "v"]
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="attention/scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"], name="attention/values"),
    ]
    shapes = {"q": [1, 2, 8, 16], "k": [1, 2, 16, 8], "v": [1, 2, 8, 16]}
    graph = helper.make_graph(
        nodes,
        "component",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    engine = BACKEND.build(Graph(model), ONE_THREAD)
    fused = [int(note.split()[0]) for note in engine.notes if "fused" in note]
    assert sum(engine.precisions.values()) + sum(fused) == 2
    session = BACKEND.open(engine.files, ONE_THREAD)
    feeds = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in names}
    scores = np.exp(feeds["q"] @ feeds["k"])
    expected = scores / scores.sum(-1, keepdims=True) @ feeds["v"]
    assert np.abs(session.run(feeds)["y"] - expected).max() < 1e-4


ATTENTION = (
    Node("q/Quantize", "QuantizeLinear", ("q", "s", "z"), ("q_codes",)),
    Node("q/Dequantize", "DequantizeLinear", ("q_codes", "s", "z"), ("q_back",)),
    Node("k/Quantize", "QuantizeLinear", ("k", "s", "z"), ("k_codes",)),
    Node("k/Dequantize", "DequantizeLinear", ("k_codes", "s", "z"), ("k_back",)),
    Node("k/Transpose", "Transpose", ("k_back",), ("k_turned",)),
    Node("scores", "MatMul", ("q_back", "k_turned"), ("scores",)),
    Node("softmax", "Softmax", ("scores",), ("weights",)),
    Node("weights/Quantize", "QuantizeLinear", ("weights", "s", "z"), ("weights_codes",)),
    Node("weights/Dequantize", "DequantizeLinear", ("weights_codes", "s", "z"), ("weights_back",)),
    Node("values", "MatMul", ("weights_back", "v"), ("y",)),
)
FUSED = ("scores", "softmax", "weights/Quantize", "values")


@pytest.mark.parametrize(
    ("origins", "takes", "multiply_codes"),
    [
        (FUSED, ("i8", "u8", "f32"), ["scores"]),
        (FUSED, ("i8", "f32", "f32"), []),
        ((*FUSED, "k/Dequantize"), ("i8", "i8", "f32"), []),
        ((*FUSED, "q/Quantize"), ("f32", "i8", "f32"), ["scores"]),
    ],
    ids=["both sides come as codes", "one does not", "one is made numbers again", "one is quantized inside"],
)
def test_a_fused_product_is_int8_only_where_codes_reach_it(origins, takes, multiply_codes):
    found = dict.fromkeys(multiply_codes, "int8")
    assert fused_precisions(ATTENTION, [Layer("Subgraph", "fp32", origins, takes)], ()) == found
    assert fused_precisions(ATTENTION, [Layer("FullyConnected", "int8", origins, takes)], ()) == {}


PERCEPTRON = (
    Node("x/Quantize", "QuantizeLinear", ("x", "s", "z"), ("x_codes",)),
    Node("x/Dequantize", "DequantizeLinear", ("x_codes", "s", "z"), ("x_back",)),
    Node("v/Dequantize", "DequantizeLinear", ("v_codes", "s", "z"), ("v_back",)),
    Node("first/Gemm", "Gemm", ("x_back", "v_back", "b"), ("h",)),
    Node("h/Quantize", "QuantizeLinear", ("h", "s", "z"), ("h_codes",)),
    Node("h/Dequantize", "DequantizeLinear", ("h_codes", "s", "z"), ("h_back",)),
    Node("w/Dequantize", "DequantizeLinear", ("w_codes", "s", "z"), ("w_back",)),
    Node("last/Gemm", "Gemm", ("h_back", "w_back", "c"), ("y",)),
)


@pytest.mark.parametrize(
    ("takes", "multiply_codes"),
    [(("u8", "i8", "f32", "i8"), ["first/Gemm", "last/Gemm"]), (("f32", "i8", "f32", "i8"), [])],
    ids=["input and weights come as codes", "the input does not"],
)
def test_fused_products_with_weights_are_int8_only_where_codes_reach_all_of_them(takes, multiply_codes):
    fused = Layer("Subgraph", "int8", ("first/Gemm/WithoutBiases", "first/Gemm", "h/Quantize", "last/Gemm"), takes)
    assert fused_precisions(PERCEPTRON, [fused], ()) == dict.fromkeys(multiply_codes, "int8")
    assert fused_precisions(PERCEPTRON, [fused], {"first/Gemm", "last/Gemm"}) == {}


def test_a_fused_product_computes_in_the_half_it_is_marked_for_where_nothing_comes_in_as_fp32():
    product = Node("scores", "MatMul", ("q", "k"), ("scores",), computes_in="bf16")
    around = [Node(f"{name}/Relu", "Relu", ("x",), (name,)) for name in ("q", "k")]
    around.append(Node("scale", "Mul", ("scores", "factor"), ("scaled",)))
    fused = Layer("Subgraph", "bf16", ("scale", "scores"), ("bf16", "bf16", "u8"))
    assert fused_precisions([*around, product], [fused], ()) == {"scores": "bf16"}
    assert fused_precisions([*around, product], [replace(fused, takes=("bf16", "f32"))], ()) == {}
    assert fused_precisions([*around, replace(product, computes_in="")], [fused], ()) == {}
    unnamed = [replace(fused, origins=("scale", ""))]
    assert fused_precisions([*around, product], unnamed, ()) == {"scores": "bf16"}
    assert fused_precisions([*around, product], unnamed, {"scores"}) == {}


@pytest.mark.skipif("avx512bw" not in cpu_features(), reason="OpenVINO fuses attention in int8 only with AVX-512")
def test_attention_in_int8_is_found_in_the_fused_kernel():
    engine = BACKEND.build(Graph(int8_attention()), ONE_THREAD)
    assert any("what reaches 2 in such layers" in note for note in engine.notes)
    assert {name: engine.layers[name] for name in ("scores", "values")} == {"scores": "int8", "values": "int8"}
    assert engine.precisions == {"int8": 2}


def int8_attention() -> bytes:
    """Scaled products of q, k and v, all of them and the weights quantized."""
    types = {"q": TensorProto.INT8, "k": TensorProto.INT8, "v": TensorProto.INT8, "weights": TensorProto.UINT8}
    constants, nodes = [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.02])], []
    for name, code in types.items():
        constants.append(helper.make_tensor(f"{name}_zero", code, [], [0]))
        given = [f"{name}_codes", "scale", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *given[1:]], given[:1], name=f"{name}/Quantize"))
        nodes.append(helper.make_node("DequantizeLinear", given, [f"{name}_back"], name=f"{name}/Dequantize"))
    products = [
        helper.make_node("MatMul", ["q_back", "k_back"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1, name="softmax"),
    ]
    last = helper.make_node("MatMul", ["weights_back", "v_back"], ["y"], name="values")
    shapes = {"q": [1, 8, 48, 32], "k": [1, 8, 32, 48], "v": [1, 8, 48, 32]}
    graph = helper.make_graph(
        [*nodes[:6], *products, *nodes[6:], last],
        "component",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["v"])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            "Exception from src/inference/src/cpp/core.cpp:105:\nCheck 'false' failed at src/report.cpp:151:\n"
            "FrontEnd API failed with OpConversionFailure:\nModel wasn't fully converted.\nSummary:\n"
            "-- No conversion rule found for operations: Nope-20\n"
            "To facilitate the conversion of unsupported operations, refer to the documentation\n\n",
            "No conversion rule found for operations: Nope-20",
        ),
        (
            "Exception from src/inference/src/cpp/core.cpp:107:\nException from src/inference/src/dev/plugin.cpp:53:\n"
            "Check 'any_of(scale.size(), OC, 1U)' failed at src/plugins/intel_cpu/src/dnnl_postops_composer.cpp:212\n",
            "check 'any_of(scale.size(), OC, 1U)' failed",
        ),
        (
            "Exception from src/inference/src/cpp/core.cpp:107:\n"
            "Check 'any_of(scale.size(), OC, 1U)' failed at src/plugins/intel_cpu/src/composer.cpp:212:\n"
            "FullyConnected node with name 'attention/scores': scales do not fit\n",
            "FullyConnected node with name 'attention/scores': scales do not fit",
        ),
    ],
)
def test_a_message_is_told_on_one_line_with_the_node_when_it_has_one(raised, told):
    assert reason(RuntimeError(raised)) == told


def test_a_model_that_snippets_fails_on_is_compiled_without(graphs, monkeypatch):
    compiled, asked = openvino.Core.compile_model, []

    def failing(self, model, device, config):
        asked.append(config.get("SNIPPETS_MODE"))
        if asked[-1] is None:
            raise RuntimeError("Check failed at src/common/snippets/src/lowered/target_machine.cpp:31: no Mish")
        return compiled(self, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", failing)
    assert BACKEND.build(Graph(graphs["conv"]), ONE_THREAD).precisions == {"fp32": 3}
    assert asked == [None, "DISABLE"]


def test_large_inputs_are_read_where_they_lie_and_left_as_they_are():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, LENT_FROM // 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, LENT_FROM // 4])
    nodes = [helper.make_node("Neg", ["x"], ["n"]), helper.make_node("Mul", ["n", "n"], ["y"])]
    graph = helper.make_graph(nodes, "component", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    session = BACKEND.open(BACKEND.build(Graph(model), ONE_THREAD).files, ONE_THREAD)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, LENT_FROM // 4)).astype(np.float32) for _ in range(6)]
    arrays[2].flags.writeable = False  # copied, as is what does not lie in one piece
    arrays[4] = np.repeat(arrays[4], 2, axis=1)[:, ::2]
    resident = Resident("openvino", "float32", arrays[5].shape, arrays[5])
    for value in [*arrays[:5], resident, arrays[0], resident, arrays[3]]:
        array = value.value if isinstance(value, Resident) else value
        before = array.copy()
        given = session.run({"x": value})["y"]
        assert np.array_equal(array, before)
        assert np.allclose(given, before**2)
        if array.flags.writeable and array is not arrays[5]:
            array += 1  # the caller's own again
