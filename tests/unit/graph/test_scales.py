"""A factor goes into the weights in front of it: one node less, the same values; where it cannot, nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, helper

from vlaopt.graph.scales import fold_scales

X = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"m/{output}", **attributes)


def weights(factor: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "w": generator.normal(size=(4, 4)).astype(np.float32),
        "b": generator.normal(size=4).astype(np.float32),
        "f": np.array(factor, np.float32),
        "shape": np.array([2, 4], np.int64),
        "flat": np.array([8], np.int64),
    }


PRODUCTS = {
    "Gemm": [node("Gemm", "x w b", "p", transB=1)],
    "MatMul": [node("MatMul", "x w", "p")],
    "MatMul and bias": [node("MatMul", "x w", "m"), node("Add", "b m", "p")],
    "moved": [
        node("Gemm", "x w b", "g"),
        node("Reshape", "g flat", "r"),
        node("Reshape", "r shape", "s"),
        node("Transpose", "s", "t", perm=[1, 0]),
        node("Transpose", "t", "p", perm=[1, 0]),
    ],
}


@pytest.mark.parametrize("product", PRODUCTS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(factor=st.floats(-8, 8, width=32))
def test_the_product_has_the_factor_in_its_weights(build: Any, run: Any, product: str, factor: float) -> None:
    def model() -> ModelProto:
        made: ModelProto = build([*PRODUCTS[product], node("Mul", "p f", "q"), node("Relu", "q", "y")], weights(factor))
        return made

    folded = fold_scales(model())
    assert "Mul" not in [entry.op_type for entry in folded.graph.node]
    expected = run(model(), {"x": X})["y"]
    np.testing.assert_allclose(run(folded, {"x": X})["y"], expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("between", "what"),
    [
        ([node("Gemm", "x w b", "g"), node("Relu", "g", "p")], "an activation lies between"),
        ([node("Relu", "x", "p")], "no weights are in front"),
        ([node("Add", "x b", "p")], "only a bias is in front"),
    ],
)
def test_it_stays_where_it_cannot_be_folded(build: Any, between: list[NodeProto], what: str) -> None:
    model = build([*between, node("Mul", "p f", "q"), node("Relu", "q", "y")], weights(0.5))
    before = model.SerializeToString()
    assert fold_scales(model).SerializeToString() == before, what


def test_it_stays_where_something_else_takes_the_product(build: Any) -> None:
    nodes = [node("Gemm", "x w b", "p"), node("Mul", "p f", "q"), node("Add", "p q", "y")]
    model = build(nodes, weights(0.5))
    before = model.SerializeToString()
    assert fold_scales(model).SerializeToString() == before


def test_weights_that_another_product_takes_too_stay_as_they_are_for_it(build: Any, run: Any) -> None:
    def model() -> ModelProto:
        nodes = [
            node("MatMul", "x w", "p"),
            node("Mul", "p f", "q"),
            node("MatMul", "x w", "o"),
            node("Add", "q o", "y"),
        ]
        made: ModelProto = build(nodes, weights(0.25))
        return made

    folded = fold_scales(model())
    assert [entry.op_type for entry in folded.graph.node] == ["MatMul", "MatMul", "Add"]
    np.testing.assert_allclose(run(folded, {"x": X})["y"], run(model(), {"x": X})["y"], atol=1e-5)
