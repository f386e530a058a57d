"""Biases take back what rounding the weights adds to a layer's outputs on average, however they reach the product."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.unit.quantization.conftest import COMPONENT, labelled
from vlaopt.artifact.graph import Graph
from vlaopt.backends import Placement
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import MinMax
from vlaopt.quantization.collect import channel_means, collect_ranges
from vlaopt.quantization.placement import write_qdq
from vlaopt.quantization.plan import (
    ComponentPlan,
    calibrated_tensors,
    component_plan,
    corrected_tensors,
    plan_nodes,
)
from vlaopt.quantization.structure import structural_check
from vlaopt.quantization.weights import layers, mean_error, quantize_weight

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
COARSE = 7
"""Weights of four bits: their rounding stands out of that of the activations."""


def one_layer(kind: str, seed: int = 0) -> ModelProto:
    """A layer with a bias, from `x` to `y`, its activations far from zero on average."""
    generator = np.random.default_rng(seed)
    shapes = {"Gemm": ((5, 6), (5,)), "MatMul": ((6, 5), (5,)), "Conv": ((4, 3, 1, 1), (4,))}
    weight, bias = (generator.normal(size=shape).astype(np.float32) for shape in shapes[kind])
    given, gives = {"Conv": ((1, 6, 3, 3), (1, 4, 3, 3)), "Gemm": ((7, 6), (7, 5)), "MatMul": ((2, 7, 6), (2, 7, 5))}[
        kind
    ]
    nodes = {
        "Gemm": [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="m/Gemm", transB=1)],
        "Conv": [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="m/Conv", group=2, kernel_shape=[1, 1])],
        "MatMul": [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="m/MatMul"),
            helper.make_node("Add", ["b", "p"], ["y"], name="m/Add"),
        ],
    }[kind]
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, gives)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def samples(model: ModelProto, seed: int = 1) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    shape = tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)
    offset = generator.uniform(1, 3, size=shape[1:2] if len(shape) == 4 else shape[-1:]).astype(np.float32)
    offset = offset.reshape(-1, 1, 1) if len(shape) == 4 else offset
    return [{"x": offset + generator.uniform(-1, 1, shape).astype(np.float32)} for _ in range(8)]


def planned(model: ModelProto, feeds: list[dict[str, np.ndarray]], *, corrected: bool) -> ComponentPlan:
    nodes = plan_nodes({COMPONENT: model}, scheme="int8", rules=[(COMPONENT, "int8")])[COMPONENT]
    graph, tensors = Graph(model.SerializeToString()), calibrated_tensors(model, nodes)
    ranges = collect_ranges(graph, lambda: labelled(feeds), tensors, MinMax(), Silent())
    axes = corrected_tensors(model, nodes) if corrected else {}
    return component_plan(graph, nodes, ranges, means=channel_means(graph, lambda: labelled(feeds), axes, Silent()))


@pytest.mark.parametrize("kind", ["Gemm", "MatMul", "Conv"])
@given(seed=st.integers(0, 1000), per_channel=st.booleans())
def test_the_mean_error_is_the_mean_of_the_errors(kind: str, seed: int, per_channel: bool) -> None:
    model = one_layer(kind, seed)
    [layer] = [entry for entry in layers(model).values() if entry.weights]
    values = numpy_helper.to_array(model.graph.initializer[0])
    codes, scale = quantize_weight(values, layer.weights[0].axis if per_channel else None, limit=COARSE)
    spread = (
        scale.reshape([-1 if at == layer.weights[0].axis else 1 for at in range(values.ndim)]) if scale.ndim else scale
    )
    x = np.stack([feed["x"].astype(np.float64) for feed in samples(model, seed)])
    error = codes * spread.astype(np.float64) - values
    if kind == "Conv":
        halves = [
            np.einsum("oi,nbihw->nbohw", part[:, :, 0, 0], part_x)
            for part, part_x in zip(np.split(error, 2), np.split(x, 2, axis=2), strict=True)
        ]
        expected = np.concatenate(halves, axis=2).mean(axis=(0, 1, 3, 4))
        means = x.mean(axis=(0, 1, 3, 4))
    else:
        means = x.reshape(-1, x.shape[-1]).mean(axis=0)
        expected = error @ means if kind == "Gemm" else means @ error
    np.testing.assert_allclose(mean_error(values, codes, scale, layer, means), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["Gemm", "MatMul", "Conv"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_corrected_outputs_are_right_on_average(kind: str, placement: Placement, run_onnxruntime: Any) -> None:
    model = one_layer(kind)
    feeds = samples(model)
    axis = 1 if kind == "Conv" else -1

    def bias_of(quantized: ModelProto) -> float:
        structural_check(quantized, placement)
        errors = [run_onnxruntime(quantized, feed) - run_onnxruntime(model, feed) for feed in feeds]
        return float(
            np.abs(
                np.moveaxis(np.stack(errors, axis=-1), axis - (axis < 0), 0)
                .reshape(errors[0].shape[axis], -1)
                .mean(axis=1)
            ).max()
        )

    before, after = (
        bias_of(write_qdq(model, planned(model, feeds, corrected=corrected), placement=placement, limit=COARSE))
        for corrected in (False, True)
    )
    assert before > 0.05
    assert after < before / 4


def test_without_means_no_bias_changes() -> None:
    model = one_layer("Gemm")
    quantized = write_qdq(model, planned(model, samples(model), corrected=False), placement="tensorrt")
    assert "b" in {tensor.name for tensor in quantized.graph.initializer}
    corrected = write_qdq(model, planned(model, samples(model), corrected=True), placement="tensorrt")
    assert "b" not in {tensor.name for tensor in corrected.graph.initializer}


def test_means_are_those_of_every_channel_over_all_calls() -> None:
    model = one_layer("Conv")
    feeds = samples(model)
    found = channel_means(Graph(model.SerializeToString()), lambda: labelled(feeds), {"x": 1}, Silent())
    np.testing.assert_allclose(found["x"], np.stack([feed["x"] for feed in feeds]).mean(axis=(0, 1, 3, 4)), rtol=1e-6)
