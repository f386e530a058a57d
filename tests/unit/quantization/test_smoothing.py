"""Scales move from loud channels into weights; what is computed stays, and where they cannot move nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.unit.quantization.conftest import labelled
from vlaopt.artifact.graph import Graph
from vlaopt.errors import StageError
from vlaopt.progress import Silent
from vlaopt.quantization.collect import channel_maxima
from vlaopt.quantization.smoothing import Smoothing, sites, smooth, smoothing
from vlaopt.quantization.weights import layers

LOUD = 40.0


def node(operator: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"{output}/{operator}", **attributes)


PATTERNS: dict[str, tuple[str, list[NodeProto]]] = {
    "norm": ("n", [node("LayerNormalization", "x g b", "n"), node("Gemm", "n w c", "y", transB=1)]),
    "norm and two products": (
        "n",
        [
            node("LayerNormalization", "x g b", "n"),
            node("MatMul", "n w", "p"),
            node("MatMul", "n v", "q"),
            node("Add", "p q", "y"),
        ],
    ),
    "factor": ("m", [node("Mul", "x g", "m"), node("MatMul", "m w", "y")]),
    "product and ReLU": ("r", [node("Gemm", "x v b", "p"), node("Relu", "p", "r"), node("Gemm", "r w c", "y")]),
    "product, bias and ReLU": (
        "r",
        [
            node("MatMul", "x v", "p"),
            node("Add", "b p", "a"),
            node("Relu", "a", "r"),
            node("MatMul", "r w", "y"),
        ],
    ),
    "weights that are shared": ("r", [node("Gemm", "x w b", "p"), node("Relu", "p", "r"), node("Gemm", "r w b", "y")]),
}


def model(nodes: list[NodeProto], seed: int = 0) -> ModelProto:
    generator = np.random.default_rng(seed)
    values = {name: generator.normal(size=(6, 6)).astype(np.float32) for name in "wv"}
    values |= {name: generator.normal(size=6).astype(np.float32) for name in "gbc"}
    values["g"][2] = values["b"][2] = LOUD
    values["v"][:, 2] *= LOUD
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (5, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (5, 6))],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def feeds(seed: int = 1) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(5, 6)).astype(np.float32)} for _ in range(4)]


def amax(graph: ModelProto, tensor: str) -> Smoothing:
    given = Graph(graph.SerializeToString())
    return channel_maxima(given, lambda: labelled(feeds()), {tensor: -1}, Silent())


def moved(graph: ModelProto, alpha: float) -> Smoothing:
    [tensor] = found = sites(graph, layers(graph))
    return smoothing(graph, found, amax(graph, tensor), alpha)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 100), alpha=st.floats(0, 1))
def test_what_is_computed_stays(run_onnxruntime: Any, pattern: str, seed: int, alpha: float) -> None:
    tensor, nodes = PATTERNS[pattern]
    graph = model(nodes, seed)
    before = graph.SerializeToString()
    by = moved(graph, alpha)
    assert list(by) == [tensor]
    smoothed = smooth(graph, by)
    assert graph.SerializeToString() == before
    for feed in feeds():
        expected = run_onnxruntime(graph, feed)
        error = np.abs(run_onnxruntime(smoothed, feed) - expected).max()
        assert error <= 1e-5 * max(1.0, np.abs(expected).max())


def test_alpha_says_where_the_loudness_goes() -> None:
    tensor, nodes = PATTERNS["norm"]
    graph = model(nodes)
    before = np.asarray(amax(graph, tensor)[tensor])
    assert before.max() > 10 * np.median(before)
    np.testing.assert_allclose(amax(smooth(graph, moved(graph, 1.0)), tensor)[tensor], 1.0, rtol=1e-4)
    level = smooth(graph, moved(graph, 0.0))
    weight = next(numpy_helper.to_array(entry) for entry in level.graph.initializer if entry.name == "w")
    np.testing.assert_allclose(np.abs(weight).max(axis=0), 1.0, rtol=1e-4)


def test_a_channel_of_zeros_keeps_its_scale() -> None:
    tensor, nodes = PATTERNS["norm"]
    graph = model(nodes)
    found = sites(graph, layers(graph))
    silent = {tensor: (0.0, *amax(graph, tensor)[tensor][1:])}
    assert smoothing(graph, found, silent, 0.5)[tensor][0] == 1.0


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (
            [node("LayerNormalization", "x g b", "n"), node("MatMul", "n w", "p"), node("Add", "p n", "y")],
            "a sum takes it",
        ),
        ([node("MatMul", "x w", "y")], "it is an input"),
        ([node("MatMul", "x v", "p"), node("Tanh", "p", "t"), node("MatMul", "t w", "y")], "Tanh does not scale"),
        ([node("MatMul", "x v", "p"), node("Transpose", "p", "t"), node("MatMul", "w t", "y")], "no weights take it"),
    ],
)
def test_it_stays_where_it_cannot_move(nodes: list[NodeProto], why: str) -> None:
    graph = model(nodes)
    assert sites(graph, layers(graph)) == {}, why


def test_only_products_that_are_named_are_smoothed() -> None:
    graph = model(PATTERNS["norm and two products"][1])
    assert sites(graph, ["p/MatMul"]) == {}
    assert list(sites(graph, ["p/MatMul", "q/MatMul"])) == ["n"]


def test_a_plan_of_another_graph_is_refused() -> None:
    with pytest.raises(StageError, match="the plan smooths 'z', where this graph has nothing to smooth"):
        smooth(model(PATTERNS["norm"][1]), {"z": (1.0,) * 6})
