"""On a GPU: ONNX Runtime's providers give the answers of the CPU, keep tensors on the device and say what ran where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, Resident
from vlaopt.backends.onnxruntime import FILE, gpu
from vlaopt.errors import StageError

NAMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")
REASONS = {name: backends.get(name).runnable() for name in NAMES}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
            for name, reason in REASONS.items()
        ],
    ),
]


def network(x: str = "x", y: str = "y", seed: int = 0) -> bytes:
    """Two products with a Relu between them, (1, 64) to (1, 64)."""
    rng = np.random.default_rng(seed)
    weights = [(rng.standard_normal((64, 64)) / 8).astype(np.float32) for _ in range(2)]
    nodes = [
        helper.make_node("MatMul", [x, "w0"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w1"], [y], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "component",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 64])],
        [numpy_helper.from_array(weight, f"w{at}") for at, weight in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def feeds(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 64)).astype(np.float32)


def test_it_gives_the_answers_of_the_cpu_and_says_what_ran_where(name: str, tmp_path: Path) -> None:
    backend, options = backends.get(name), EngineOptions(cache=tmp_path)
    engine = backend.build(Graph(network()), options)
    assert set(engine.facts["providers"]) <= {gpu.CUDA, gpu.TENSORRT}
    expected = backends.get("onnxruntime").open({FILE: network()}, EngineOptions(threads=1)).run({"x": feeds()})["y"]
    # TF32, which both providers multiply in where the GPU has it, keeps ten bits.
    np.testing.assert_allclose(backend.open(engine.files, options).run({"x": feeds()})["y"], expected, atol=2e-2)


def test_a_resident_stays_on_the_device(name: str, tmp_path: Path) -> None:
    backend, options = backends.get(name), EngineOptions(cache=tmp_path)
    first = backend.open({FILE: network("x", "y")}, options)
    second = backend.open({FILE: network("y", "z", seed=2)}, options)
    resident = first.run({"x": feeds()}, resident={"y"})["y"]
    assert isinstance(resident, Resident)
    assert resident.value.device_name() == "cuda"
    copied = first.run({"x": feeds()})["y"]
    np.testing.assert_array_equal(second.run({"y": resident})["z"], second.run({"y": copied})["z"])


def test_a_node_that_only_the_cpu_has_is_refused_by_name(name: str) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["h"], name="square"),
        helper.make_node("Det", ["h"], ["y"], name="determinant"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "component", [x], [y]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    with pytest.raises(StageError, match=r"on CPUExecutionProvider: determinant \(Det\)"):
        backends.get(name).build(Graph(model.SerializeToString()), EngineOptions())
