"""Small graphs, and onnx's own evaluator, which is independent of every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx.reference
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Build = Callable[..., ModelProto]
Run = Callable[[ModelProto, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.fixture
def build() -> Build:
    """Makes a model from float32 `x` to float32 `y`, both of one shape."""

    def make(
        nodes: list[NodeProto],
        initializers: Mapping[str, np.ndarray] | None = None,
        *,
        x: str = "x",
        y: str = "y",
        shape: tuple[int, ...] = (1, 4),
        opsets: Mapping[str, int] | None = None,
    ) -> ModelProto:
        body = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(value, name) for name, value in (initializers or {}).items()],
        )
        imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": 20}).items()]
        return helper.make_model(body, opset_imports=imports, ir_version=10)

    return make


@pytest.fixture
def linear(build: Build) -> Callable[..., ModelProto]:
    """Makes `y = x @ w` with the node `head/MatMul`; keyword arguments as for `build`."""

    def make(weight: np.ndarray | None = None, **options: Any) -> ModelProto:
        weight = np.eye(4, dtype=np.float32) if weight is None else weight
        names = {key: options[key] for key in ("x", "y") if key in options}
        node = helper.make_node("MatMul", [names.get("x", "x"), "w"], [names.get("y", "y")], name="head/MatMul")
        return build([node], {"w": weight}, **options)

    return make


@pytest.fixture
def run() -> Run:
    """Evaluates a model with onnx's reference."""

    def evaluate(model: ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [value.name for value in model.graph.output]
        return dict(zip(names, onnx.reference.ReferenceEvaluator(model).run(None, dict(feeds)), strict=True))

    return evaluate
