"""Dynamic int8 is standard ONNX that stays near FP32 without calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from vlaopt.artifact.graph import Graph
from vlaopt.errors import StageError
from vlaopt.quantization.dynamic import write_dynamic
from vlaopt.quantization.plan import ComponentPlan, component_plan, plan_nodes
from vlaopt.quantization.structure import quantized_layers, structural_check


@pytest.fixture
def dynamic(network: ModelProto) -> ComponentPlan:
    nodes = plan_nodes({"vision": network}, scheme="int8-dynamic", rules=[("vision", "int8-dynamic")])["vision"]
    return component_plan(Graph(b""), nodes, {})


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("library", ["run_onnxruntime", "run_openvino"])
def test_the_graph_stays_near_fp32(
    network: ModelProto, dynamic: ComponentPlan, feeds: Any, weights: Any, library: str, request: Any
) -> None:
    run = request.getfixturevalue(library)
    quantized = write_dynamic(network, dynamic, weights=weights)
    expected = np.stack([run(network, feed) for feed in feeds])
    got = np.stack([run(quantized, feed) for feed in feeds])
    assert 0.0 < np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


def test_products_keep_their_names_and_only_standard_operators_are_used(
    network: ModelProto, dynamic: ComponentPlan
) -> None:
    quantized = write_dynamic(network, dynamic)
    assert quantized_layers(quantized) == ["project/Gemm", "output/MatMul"]
    assert {node.domain for node in quantized.graph.node} == {""}
    structural_check(quantized, "onnxruntime")


def test_tensorrt_has_no_form_of_it(network: ModelProto, dynamic: ComponentPlan) -> None:
    with pytest.raises(StageError, match=r"DynamicQuantizeLinear .* has no form in TensorRT"):
        structural_check(write_dynamic(network, dynamic), "tensorrt")


def test_a_node_without_a_dynamic_form_is_an_error(network: ModelProto, dynamic: ComponentPlan) -> None:
    nodes = {"stem/Conv": dynamic.nodes["project/Gemm"]}
    with pytest.raises(StageError, match="dynamic int8 of 'stem/Conv'"):
        write_dynamic(network, dynamic.model_copy(update={"nodes": nodes}))
