"""x86-rtx: NVIDIA's own builder makes a real engine on a machine without a GPU."""

from __future__ import annotations

import json

import pytest

from tests.integration.conftest import RTX, SMALL
from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import Build, build, run_stages
from vlaopt.errors import StageError
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import ORDER

MAGIC = b"vtrt"
"""What every engine of TensorRT for RTX 1.7 begins with."""

pytestmark = [
    pytest.mark.skipif(
        backends.get("tensorrt-rtx").missing() is not None, reason="TensorRT for RTX is not installed here"
    ),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What the recipes of this module share is made once."""
    return Store(tmp_path_factory.mktemp("rtx"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Build:
    return build(load_recipe(RTX, overrides=SMALL), output=tmp_path_factory.mktemp("artifacts"), store=store)


def engine_of(store: Store, *overrides: str) -> Artifact:
    """The result of stage `engine`."""
    recipe = load_recipe(RTX, overrides=[*SMALL, *overrides])
    names = ORDER[: ORDER.index("engine") + 1]
    return run_stages(recipe, None, names, store=store, progress=Silent())[-1].artifact


def engine_bytes(artifact: Artifact, *components: str) -> int:
    found = artifact.manifest.by_role("engine")
    return sum(entry.size for entry in found if any(f"/{name}/" in entry.path for name in components))


def test_the_artifact_holds_a_real_engine_for_every_component(built: Build) -> None:
    artifact = Artifact.open(built.artifact.path)
    artifact.check()
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.backend == "tensorrt-rtx"
    assert set(engine.components) == {"vision", "language", "head"}
    for entry in artifact.manifest.by_role("engine"):
        data = artifact.read(entry.path)
        assert data.startswith(MAGIC)
        assert len(data) > 100_000


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


def test_every_layer_planned_in_int8_is_seen_to_be_though_no_gpu_is_here(built: Build) -> None:
    """By the layers that NVIDIA's builder logs."""
    audits = built.artifact.manifest.metrics["engine"]["audit"]
    assert sum(audit["planned"] for audit in audits.values()) > 0
    assert all(audit["kept"] == audit["planned"] and audit["others"] == {} for audit in audits.values())


def test_an_engine_that_leaves_the_plan_fails_the_build_though_it_cannot_run_here(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is what is changed here: it calls for int8 where the graph, written before, has none."""
    if backends.get("tensorrt-rtx").runnable() is None:
        pytest.skip("this machine runs the engine")
    monkeypatch.setattr("vlaopt.stages.engine._planned", lambda source, component: {"lost/MatMul": "int8"})
    with pytest.raises(
        StageError, match=r"tensorrt-rtx runs 1 of 1 layers of \w+ in unknown precision that were planned"
    ):
        engine_of(store, "engine.tensorrt.optimization_level=2")


def test_the_engines_hold_their_weights_in_int8(built: Build, store: Store) -> None:
    """Three bytes less for every int8 weight."""
    onnx = pytest.importorskip("onnx")
    plain = engine_of(store, "quantize.scheme=none")
    for component in ("vision", "head"):
        model = onnx.load_model_from_string(built.artifact.read(f"onnx/{component}.onnx"))
        stored = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
        weights = sum(onnx.numpy_helper.to_array(tensor).size for tensor in stored)
        assert weights > 100_000
        saved = engine_bytes(plain, component) - engine_bytes(built.artifact, component)
        assert saved > 0.8 * 3 * weights, component


def test_a_mixed_plan_is_searched_by_estimate_where_no_gpu_is(built: Build, store: Store) -> None:
    if backends.get("tensorrt-rtx").runnable() is None:
        pytest.skip("this machine runs the engine")
    artifact = engine_of(store, "quantize.scheme=mixed", "quantize.evaluations=8")
    search = json.loads(artifact.read("reports/quantize.json"))["search"]
    assert search["times"] == "estimated by multiply-adds"
    assert search["backend"] == "onnxruntime", "it tells the action error, no time"
    assert {scheme for found in artifact.manifest.metrics["onnx"]["layers"].values() for scheme in found} == {
        "fp32",
        "int8",
    }
    plain = engine_of(store, "quantize.scheme=none")
    assert engine_bytes(artifact, "vision", "head") < 0.8 * engine_bytes(plain, "vision", "head")


def test_it_says_that_the_engine_was_not_run(built: Build) -> None:
    reason = backends.get("tensorrt-rtx").runnable()
    if reason is None:
        pytest.skip("this machine runs the engine")
    metrics = built.artifact.manifest.metrics
    assert metrics["engine"]["not_run"] == reason
    assert metrics["bench"] == {"not_measured": reason}
    assert metrics["verify"]["backend"] == "onnxruntime"
