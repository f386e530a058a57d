"""Residual blocks and attention: one plan, a placement per kind of backend, equal results, and TensorRT takes it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.unit.quantization.conftest import COMPONENT, labelled
from vlaopt.artifact.graph import Graph
from vlaopt.backends import Placement
from vlaopt.errors import InputError, StageError
from vlaopt.graph.topology import producers
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import MinMax
from vlaopt.quantization.collect import collect_ranges
from vlaopt.quantization.placement import write_qdq
from vlaopt.quantization.plan import ComponentPlan, calibrated_tensors, component_plan, plan_nodes
from vlaopt.quantization.structure import quantized_layers, structural_check
from vlaopt.quantization.weights import REDUCED_LIMIT, layers, residuals

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
CONVOLUTIONS = {"stem": 3, "first": 8, "second": 8, "third": 8, "down": 8}
"""The convolutions of the network, by the channels that they take."""


@pytest.fixture(scope="module")
def network() -> ModelProto:
    """A stem, a residual block, one with a convolution in its skip, then attention of two heads over 64 positions."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    values = {f"{name}.weight": normal(8, channels, 3, 3) for name, channels in CONVOLUTIONS.items()}
    values |= {f"{name}.bias": normal(8) for name in CONVOLUTIONS}
    values |= {f"{name}.weight": normal(8, 8) for name in ("query", "key", "value", "output")}
    values |= {"rows": np.array([8, 64], np.int64), "heads": np.array([64, 2, 4], np.int64)}
    values |= {"joined": np.array([64, 8], np.int64)}

    def node(operator: str, inputs: str, name: str, **attributes: Any) -> Any:
        return helper.make_node(operator, inputs.split(), [name], name=f"{name}/{operator}", **attributes)

    def conv(tensor: str, name: str) -> Any:
        inputs = f"{tensor} {name}.weight {name}.bias"
        return node("Conv", inputs, name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    nodes = [
        conv("x", "stem"),
        node("Relu", "stem", "stem.relu"),
        conv("stem.relu", "first"),
        node("Relu", "first", "first.relu"),
        conv("first.relu", "second"),
        node("Add", "second stem.relu", "sum"),
        node("Relu", "sum", "sum.relu"),
        conv("sum.relu", "third"),
        conv("sum.relu", "down"),
        node("Add", "third down", "sum2"),
        node("Relu", "sum2", "sum2.relu"),
        node("Reshape", "sum2.relu rows", "flat"),
        node("Transpose", "flat", "tokens", perm=[1, 0]),
    ]
    for name in ("query", "key", "value"):
        nodes += [
            node("MatMul", f"tokens {name}.weight", name),
            node("Reshape", f"{name} heads", f"{name}.heads"),
            node("Transpose", f"{name}.heads", f"{name}.t", perm=[1, 2, 0] if name == "key" else [1, 0, 2]),
        ]
    nodes += [
        node("MatMul", "query.t key.t", "scores"),
        node("Softmax", "scores", "shares", axis=-1),
        node("MatMul", "shares value.t", "mixed"),
        node("Transpose", "mixed", "mixed.t", perm=[1, 0, 2]),
        node("Reshape", "mixed.t joined", "mixed.rows"),
        helper.make_node("MatMul", ["mixed.rows", "output.weight"], ["y"], name="output/MatMul"),
    ]
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (64, 8))],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(2)
    return [{"x": generator.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)} for _ in range(6)]


@pytest.fixture(scope="module")
def plan(network: ModelProto, feeds: list[dict[str, np.ndarray]]) -> ComponentPlan:
    nodes = plan_nodes({COMPONENT: network}, scheme="int8", rules=[(COMPONENT, "int8")])[COMPONENT]
    graph, tensors = Graph(network.SerializeToString()), calibrated_tensors(network, nodes)
    ranges = collect_ranges(graph, lambda: labelled(feeds), tensors, MinMax(), Silent())
    return component_plan(graph, nodes, ranges)


def quantizers(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor that is quantized, by its name."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {node.input[0]: kinds[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_products_of_two_activations_are_layers_that_rules_name(network: ModelProto, plan: ComponentPlan) -> None:
    assert {"scores/MatMul", "mixed/MatMul"} <= set(plan.named("int8"))
    found = layers(network)["scores/MatMul"]
    assert (found.weights, found.activations) == ((), ("query.t", "key.t"))
    assert found.intensity == pytest.approx(2 * 64 * 64 * 4 / (2 * 64 * 4 * 2 + 2 * 64 * 64))
    nodes = plan_nodes({COMPONENT: network}, scheme="int8", rules=[("vision", "int8"), ("vision.scores", "fp32")])
    assert nodes[COMPONENT]["scores/MatMul"].scheme == "fp32"
    assert nodes[COMPONENT]["mixed/MatMul"].scheme == "int8"


def test_a_product_of_two_activations_has_no_weights_to_store(network: ModelProto) -> None:
    with pytest.raises(InputError, match="can be int8-weights: it multiplies two activations"):
        plan_nodes({COMPONENT: network}, scheme="int8", rules=[("vision.scores", "int8-weights")])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_of_one_plan_computes_what_was_planned_in_8_bit_close_to_fp32(
    network: ModelProto, plan: ComponentPlan, feeds: Any, placement: Placement, run_onnxruntime: Any, run_openvino: Any
) -> None:
    quantized = write_qdq(network, plan, placement=placement, limit=REDUCED_LIMIT)
    structural_check(quantized, placement)
    assert quantized_layers(quantized) == plan.named("int8")
    expected = np.stack([run_onnxruntime(network, feed) for feed in feeds])
    first, second = (np.stack([run(quantized, feed) for feed in feeds]) for run in (run_onnxruntime, run_openvino))
    largest = np.abs(expected).max()
    assert 0 < np.abs(first - expected).max() < 0.06 * largest
    assert np.abs(second - expected).max() < 0.06 * largest
    assert np.abs(first - second).max() < 0.03 * largest


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_the_library_computes_its_own_placement_in_8_bit(
    network: ModelProto, plan: ComponentPlan, library: str
) -> None:
    from vlaopt import backends

    backend = backends.get(library)
    if reason := backend.missing():
        pytest.skip(reason)
    model = write_qdq(network, plan, placement=backend.placement, limit=REDUCED_LIMIT)
    engine = backend.build(Graph(model.SerializeToString()), backends.EngineOptions(threads=1))
    assert {name: engine.layers.get(name) for name in plan.named("int8")} == dict.fromkeys(plan.named("int8"), "int8")


def test_skips_of_residual_blocks_are_found(network: ModelProto, plan: ComponentPlan) -> None:
    assert residuals(network.graph, plan.named("int8")) == {"sum/Add": "stem.relu", "sum2/Add": "down"}
    assert residuals(network.graph, ["third/Conv"]) == {"sum2/Add": "down"}
    assert residuals(network.graph, []) == {}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_residual_sum_takes_its_skip_quantized(
    network: ModelProto, plan: ComponentPlan, placement: Placement
) -> None:
    graph = write_qdq(network, plan, placement=placement).graph
    made = {name: node.op_type for name, node in producers(graph).items()}
    sums = {node.name: [made[name] for name in node.input] for node in graph.node if node.op_type == "Add"}
    direct, dequantized = "Conv", "DequantizeLinear"
    assert (
        sums
        == {
            "onnxruntime": {"sum/Add": [dequantized, dequantized], "sum2/Add": [dequantized, dequantized]},
            "openvino": {"sum/Add": [direct, dequantized], "sum2/Add": [direct, direct]},
            "tensorrt": {"sum/Add": [direct, dequantized], "sum2/Add": [direct, dequantized]},
        }[placement]
    )


def test_each_kind_of_backend_has_its_own_form_of_activations(network: ModelProto, plan: ComponentPlan) -> None:
    assert set(quantizers(write_qdq(network, plan, placement="onnxruntime")).values()) == {TensorProto.UINT8}
    assert set(quantizers(write_qdq(network, plan, placement="tensorrt")).values()) == {TensorProto.INT8}
    found = quantizers(write_qdq(network, plan, placement="openvino"))
    unsigned = {name for name, kind in found.items() if kind == TensorProto.UINT8}
    assert unsigned == {"stem.relu", "first.relu", "sum.relu", "tokens", "shares"}
    assert {"x", "query.t", "key.t", "value.t", "mixed.rows"} == set(found) - unsigned


def test_the_right_one_of_two_activations_has_as_many_bits_as_weights(network: ModelProto, plan: ComponentPlan) -> None:
    model = write_qdq(network, plan, placement="openvino", limit=REDUCED_LIMIT)
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, limit in (("key.t", REDUCED_LIMIT), ("query.t", 127)):
        assert scales[f"{name}_scale"] == pytest.approx(max(np.abs(plan.ranges[name])) / limit)


@pytest.mark.parametrize("placement", ["onnxruntime", "openvino"])
def test_sums_of_two_activations_do_not_saturate(placement: Placement, run_onnxruntime: Any, run_openvino: Any) -> None:
    """On x86 CPUs without VNNI sums of two full 8-bit products do, where they are added in int16."""
    body = helper.make_graph(
        [
            helper.make_node("Relu", ["a"], ["left"], name="left/Relu"),
            helper.make_node("Transpose", ["a"], ["right"], name="right/Transpose", perm=[0, 2, 1]),
            helper.make_node("MatMul", ["left", "right"], ["y"], name="product/MatMul"),
        ],
        "test",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, (2, 32, 64))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 32, 32))],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    nodes = plan_nodes({COMPONENT: model}, scheme="int8", rules=[(COMPONENT, "int8")])[COMPONENT]
    given = Graph(model.SerializeToString())
    plan = component_plan(given, nodes, {}).model_copy(update={"ranges": {"left": (0.0, 1.0), "right": (-1.0, 1.0)}})
    run = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}[placement]
    quantized = write_qdq(model, plan, placement=placement, limit=REDUCED_LIMIT)
    np.testing.assert_allclose(run(quantized, {"a": np.ones((2, 32, 64), np.float32)}), 64.0, rtol=0.02)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_half_a_quantized_product_is_refused(network: ModelProto, plan: ComponentPlan, placement: Placement) -> None:
    model = write_qdq(network, plan, placement=placement)
    product = next(node for node in model.graph.node if node.name == "scores/MatMul")
    product.input[1] = "key.t"
    for name in ("key.t_quantized/QuantizeLinear", "key.t_dequantized/DequantizeLinear"):
        model.graph.node.remove(next(node for node in model.graph.node if node.name == name))
    with pytest.raises(StageError, match="MatMul 'scores/MatMul' multiplies a quantized tensor by one that is not"):
        structural_check(model, placement)


def test_symmetric_int8_straight_behind_a_product_is_refused_for_openvino(
    network: ModelProto, plan: ComponentPlan
) -> None:
    model = write_qdq(network, plan, placement="openvino")
    quantizer = next(node for node in model.graph.node if node.name == "query.t_quantized/QuantizeLinear")
    quantizer.input[0] = "query"
    with pytest.raises(StageError, match=r"'query\.t_quantized/QuantizeLinear' is int8 behind a MatMul"):
        structural_check(model, "openvino")


def test_products_in_a_row_are_placed_for_openvino_in_a_form_that_it_compiles(run_openvino: Any) -> None:
    values = {name: np.eye(8, dtype=np.float32) for name in ("v", "w")}
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "v"], ["p"], name="first/MatMul"),
            helper.make_node("MatMul", ["p", "w"], ["y"], name="second/MatMul"),
        ],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (4, 8))],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    nodes = plan_nodes({COMPONENT: model}, scheme="int8", rules=[(COMPONENT, "int8")])[COMPONENT]
    plan = component_plan(Graph(model.SerializeToString()), nodes, {})
    quantized = write_qdq(
        model, plan.model_copy(update={"ranges": {"x": (-1.0, 1.0), "p": (-1.0, 1.0)}}), placement="openvino"
    )
    structural_check(quantized, "openvino")
    assert quantizers(quantized) == {"x": TensorProto.INT8, "p": TensorProto.UINT8}
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
    np.testing.assert_allclose(run_openvino(quantized, {"x": x}), x, atol=0.02)


def test_nvidias_builder_takes_residual_blocks_and_attention(network: ModelProto, plan: ComponentPlan) -> None:
    from vlaopt.backends import EngineOptions
    from vlaopt.backends.tensorrt.rtx import BACKEND

    if reason := BACKEND.missing():
        pytest.skip(reason)
    model = write_qdq(network, plan, placement="tensorrt")
    structural_check(model, "tensorrt")
    engine = BACKEND.build(Graph(model.SerializeToString()), EngineOptions(compute_capabilities=("8.9",)))
    assert len(next(iter(engine.files.values()))) > 10_000


@pytest.fixture(scope="module")
def pooled() -> ModelProto:
    """A convolution, Relu and a pool that two convolutions take, one of them too small to pay alone."""
    generator = np.random.default_rng(3)

    def conv(tensor: str, name: str, size: int) -> Any:
        inputs = [tensor, f"{name}.weight"]
        return helper.make_node(
            "Conv", inputs, [name], name=f"{name}/Conv", kernel_shape=[size, size], pads=[size // 2] * 4
        )

    shapes = {"stem": (32, 3, 3, 3), "large": (32, 32, 3, 3), "small": (8, 32, 1, 1)}
    values = {name: (generator.normal(size=shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    body = helper.make_graph(
        [
            conv("x", "stem", 3),
            helper.make_node("Relu", ["stem"], ["relu"], name="relu/Relu"),
            helper.make_node("MaxPool", ["relu"], ["pool"], name="pool/MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
            conv("pool", "large", 3),
            conv("pool", "small", 1),
            helper.make_node("Concat", ["large", "small"], ["y"], name="Concat", axis=1),
        ],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 40, 4, 4))],
        [numpy_helper.from_array(value, f"{name}.weight") for name, value in values.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def plan_of(model: ModelProto, feeds: list[dict[str, np.ndarray]], **asked: Any) -> ComponentPlan:
    nodes = plan_nodes({COMPONENT: model}, scheme="int8", **asked)[COMPONENT]
    graph = Graph(model.SerializeToString())
    ranges = collect_ranges(graph, lambda: labelled(feeds), calibrated_tensors(model, nodes), MinMax(), Silent())
    return component_plan(graph, nodes, ranges)


def test_a_convolution_that_would_not_pay_alone_joins_one_that_takes_the_same_in_8_bits(
    pooled: ModelProto, feeds: list[dict[str, np.ndarray]]
) -> None:
    plan = plan_of(pooled, feeds)
    assert plan.named("int8") == ["large/Conv", "small/Conv"]
    assert plan.nodes["small/Conv"].reason == "another int8 layer takes what it takes"
    alone = plan_of(pooled, feeds, rules=[("vision.stem", "int8"), ("vision.large", "fp32")])
    assert alone.named("int8") == ["stem/Conv"]
    assert "too few" in alone.nodes["small/Conv"].reason


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_pool_takes_codes_on_openvino_and_gives_the_same_numbers(
    pooled: ModelProto,
    feeds: list[dict[str, np.ndarray]],
    placement: Placement,
    run_onnxruntime: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(pooled, feeds)
    quantized = write_qdq(pooled, plan, placement=placement)
    structural_check(quantized, placement)
    assert quantized_layers(quantized) == plan.named("int8")
    places = {"relu", "pool"} & set(quantizers(quantized))
    assert places == ({"relu"} if placement == "openvino" else {"pool"})
    monkeypatch.setattr("vlaopt.quantization.placement._Writer._pooled", lambda *arguments: set())
    usual = write_qdq(pooled, plan, placement=placement)
    assert "pool" in quantizers(usual)
    for feed in feeds:
        assert np.array_equal(run_onnxruntime(quantized, feed), run_onnxruntime(usual, feed))


def test_a_pool_that_others_take_in_floats_stays_in_floats(
    pooled: ModelProto, feeds: list[dict[str, np.ndarray]]
) -> None:
    plan = plan_of(pooled, feeds, rules=[("vision.small", "fp32")])
    assert "pool" in quantizers(write_qdq(pooled, plan, placement="openvino"))
