"""Small ONNX graphs that every backend must agree on, as serialised bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Graph = dict[str, bytes]

SCALES = {"image": 0.03, "k": 0.012, "r": 0.03, "f": 0.01, "w": 0.012}


def serialise(nodes: list, inputs: dict, outputs: dict, weights: dict[str, np.ndarray | onnx.TensorProto]) -> bytes:
    """An opset 20 model, checked, of `nodes`; every input and output is float32."""
    initializers = [w if isinstance(w, onnx.TensorProto) else numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(
        nodes,
        "component",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("maker.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def weight(*shape: int, seed: int) -> np.ndarray:
    """Float32 weights whose products keep a variance near 1."""
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(max(1, int(np.prod(shape[1:]))))
    return values.astype(np.float32)


def conv_net() -> bytes:
    nodes = [
        helper.make_node("Conv", ["image", "k1", "b1"], ["c1"], name="stem/conv", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="stem/relu"),
        helper.make_node("Conv", ["r1", "k2", "b1"], ["c2"], name="block/conv", pads=[1] * 4, group=16),
        helper.make_node("Relu", ["c2"], ["r2"], name="block/relu"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w"], ["features"], name="head/fc"),
    ]
    weights = {
        "k1": weight(16, 3, 3, 3, seed=1),
        "k2": weight(16, 1, 3, 3, seed=2),
        "b1": weight(16, seed=3),
        "w": weight(16, 4, seed=4),
    }
    return serialise(nodes, {"image": [1, 3, 16, 16]}, {"features": [1, 4]}, weights)


def lstm_net() -> bytes:
    nodes = [
        helper.make_node("LSTM", ["sequence", "w", "r"], ["y", "h"], name="memory/lstm", hidden_size=8),
        helper.make_node("Squeeze", ["h", "axes"], ["state"], name="squeeze"),
    ]
    weights = {"w": weight(1, 32, 4, seed=5), "r": weight(1, 32, 8, seed=6), "axes": np.array([0], np.int64)}
    return serialise(nodes, {"sequence": [5, 1, 4]}, {"state": [1, 8]}, weights)


def quantized(name: str, zero_point: str) -> list:
    """Nodes that take `name` to `name_dq` by the scale `name_s`."""
    return [
        helper.make_node("QuantizeLinear", [name, f"{name}_s", zero_point], [f"{name}_q"], name=f"{name}/q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", zero_point], [f"{name}_dq"], name=f"{name}/dq"),
    ]


def quantized_net(kind: int = TensorProto.INT8) -> bytes:
    """Conv, Relu, pool, MatMul with symmetric Q/DQ of element type `kind` around both matrix layers."""
    nodes = [
        *quantized("image", "zero"),
        *quantized("k", "zero"),
        helper.make_node("Conv", ["image_dq", "k_dq", "b"], ["c"], name="stem/conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="stem/relu"),
        *quantized("r", "zero"),
        helper.make_node("GlobalAveragePool", ["r_dq"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        *quantized("f", "zero"),
        *quantized("w", "zero"),
        helper.make_node("MatMul", ["f_dq", "w_dq"], ["features"], name="head/fc"),
    ]
    weights = {
        "k": weight(16, 3, 3, 3, seed=7),
        "b": weight(16, seed=8),
        "w": weight(16, 4, seed=9),
        "zero": helper.make_tensor("zero", kind, [], [0]),
        **{f"{name}_s": np.float32(scale) for name, scale in SCALES.items()},
    }
    return serialise(
        nodes,
        {"image": [1, 3, 8, 8]},
        {"features": [1, 4]},
        {name: np.asarray(w) if not isinstance(w, onnx.TensorProto) else w for name, w in weights.items()},
    )


@pytest.fixture(scope="session")
def graphs() -> Graph:
    return {"conv": conv_net(), "lstm": lstm_net(), "int8": quantized_net()}


@pytest.fixture(scope="session")
def product_of_bytes() -> Callable[[int], bytes]:
    """A product of non-negative uint8 activations (8, 512) with int8 weights, the largest as given."""

    def make(limit: int) -> bytes:
        codes = np.clip(np.rint(weight(512, 16, seed=3) * 2 * limit), -limit, limit).astype(np.int8)
        nodes = [
            *quantized("x", "zero"),
            helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_zero"], ["w_dq"], name="w/dq"),
            helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"], name="product"),
        ]
        weights = {
            "x_s": np.float32(0.004),
            "zero": np.asarray(np.uint8(0)),
            "w_q": codes,
            "w_s": np.float32(0.01),
            "w_zero": np.asarray(np.int8(0)),
        }
        return serialise(nodes, {"x": [8, 512]}, {"y": [8, 16]}, {n: np.asarray(w) for n, w in weights.items()})

    return make


@pytest.fixture(scope="session")
def quantized_graph() -> Callable[[int], bytes]:
    return quantized_net


@pytest.fixture(scope="session")
def one_node() -> Callable[..., bytes]:
    """A graph of one node (operator, domain) from input `x` to output `y`, both (1, 8)."""

    def make(operator: str, domain: str = "", x: str = "x", y: str = "y") -> bytes:
        node = helper.make_node(operator, [x], [y], name="my/node 1", domain=domain)
        return serialise([node], {x: [1, 8]}, {y: [1, 8]}, {})

    return make
