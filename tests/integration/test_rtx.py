"""x86-rtx: NVIDIA's own builder makes a real engine on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import RTX, SMALL
from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import Build, build
from vlaopt.recipe.load import load_recipe

pytestmark = [
    pytest.mark.xdist_group("rtx"),
    pytest.mark.skipif(
        backends.get("tensorrt-rtx").missing() is not None, reason="TensorRT for RTX is not installed here"
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("rtx")
    return build(load_recipe(RTX, overrides=SMALL), output=folder / "artifacts", store=Store(folder / "store"))


def test_the_artifact_holds_a_real_engine_for_every_component(built: Build) -> None:
    artifact = Artifact.open(built.artifact.path)
    artifact.check()
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.backend == "tensorrt-rtx"
    assert set(engine.components) == {"vision", "language", "head"}
    for entry in artifact.manifest.by_role("engine"):
        data = artifact.read(entry.path)
        assert len(data) > 10_000
        assert data[:8] != b"\x08\x0a\x12\x07pytorch"[:8], "an engine, not the ONNX graph"


def test_its_graphs_hold_symmetric_int8(built: Build) -> None:
    onnx = pytest.importorskip("onnx")
    artifact = built.artifact
    model = onnx.load_model_from_string(artifact.read("onnx/vision.onnx"))
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    zero_points = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if any(tensor.name == node.input[2] for node in quantizers if len(node.input) > 2)
    }
    assert zero_points
    assert all(value.dtype == "int8" and not value.any() for value in zero_points.values())


def test_int8_engines_are_smaller_than_fp32_ones(built: Build, tmp_path: Path) -> None:
    plain = build(
        load_recipe(RTX, overrides=[*SMALL, "quantize.scheme=none"]), output=tmp_path / "a", store=Store(tmp_path / "s")
    )
    assert built.artifact.size("engine") < plain.artifact.size("engine")


def test_it_says_that_the_engine_was_not_run(built: Build) -> None:
    reason = backends.get("tensorrt-rtx").runnable()
    if reason is None:
        pytest.skip("this machine runs the engine")
    metrics = built.artifact.manifest.metrics
    assert metrics["engine"]["not_run"] == reason
    assert metrics["bench"] == {"not_measured": reason}
    assert metrics["verify"]["backend"] == "onnxruntime"
