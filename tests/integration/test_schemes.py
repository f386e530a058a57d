"""Every method, scheme and calibrator that a recipe may ask for goes through the chain and does what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load

from tests.integration.conftest import CPU, NO_RECOVERY, SmallBuild
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.store import Store
from vlaopt.benchmark.environment import cpu_features
from vlaopt.chain import run_stages
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import open_artifact
from vlaopt.stages import ORDER
from vlaopt.target import load_target

RELAXED = [override for override in NO_RECOVERY if not override.startswith("prune.")]


def run(
    built: SmallBuild, first: str, last: str, overrides: list[str], folder: Path, target: str | None = None
) -> Artifact:
    """The stages from `first` to `last` with other values, on the small build's result before `first`."""
    names = ORDER[ORDER.index(first) : ORDER.index(last) + 1]
    source = built.result.outcomes[ORDER.index(first) - 1].artifact
    recipe = load_recipe(CPU, overrides=[*RELAXED, *overrides], target=target)
    return run_stages(recipe, source, names, store=Store(folder / "store"), progress=Silent())[-1].artifact


def operators(artifact: Artifact, component: str) -> dict[str, int]:
    model = onnx.load_model_from_string(artifact.read(component_path(component)))
    kinds = [node.op_type for node in model.graph.node]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("calibrator", ["minmax", "entropy", "percentile", "mse"])
def test_every_calibrator_gives_graphs_within_the_limits(
    small_build: SmallBuild, tmp_path: Path, calibrator: str
) -> None:
    overrides = ["prune.recovery=null", f"quantize.calibrator={calibrator}"]
    result = run(small_build, "quantize", "onnx", overrides, tmp_path)
    metrics: dict[str, Any] = result.manifest.metrics["onnx"]
    assert {name: layers.get("int8", 0) for name, layers in metrics["layers"].items()} == {
        "head": 2,
        "language": 0,
        "vision": 1,
    }
    assert metrics["action_error"]["executed"]["mean"] < 0.1
    assert operators(result, "vision")["QuantizeLinear"] >= 1


def test_no_scheme_leaves_fp32_graphs_that_equal_the_exported_ones(small_build: SmallBuild, tmp_path: Path) -> None:
    result = run(small_build, "quantize", "onnx", ["prune.recovery=null", "quantize.scheme=none"], tmp_path)
    assert result.manifest.metrics["onnx"]["quantized_nodes"] == 0
    assert result.manifest.metrics["onnx"]["parity"]["simplified graphs"] <= 1e-4
    assert not any(kind.endswith("QuantizeLinear") for kind in operators(result, "vision"))
    assert not result.manifest.by_role("plain")


def test_dynamic_int8_needs_no_calibration_and_really_runs(small_build: SmallBuild, tmp_path: Path) -> None:
    overrides = [
        "prune.recovery=null",
        "quantize.scheme=int8-dynamic",
        "quantize.rules=[]",
        "calibration=null",
        "engine.backend=onnxruntime",
        "engine.minimum_speedup=0.1",
    ]
    result = run(small_build, "quantize", "engine", overrides, tmp_path)
    assert operators(result, "head")["MatMulInteger"] == 2
    engine = result.manifest.engine
    assert engine is not None
    assert engine.components["head"].precisions["int8"] == 2


def test_unstructured_pruning_zeroes_weights_and_recovery_keeps_the_zeros(
    small_build: SmallBuild, tmp_path: Path
) -> None:
    overrides = [
        "prune.method=l1-unstructured",
        "prune.amount=0.3",
        'prune.scopes=["head.*"]',
        "prune.recovery.steps=2",
        "prune.recovery.batch_size=8",
        "accept.action_error.mean=5",
        "accept.jerk=5",
        "accept.gripper_flips=1",
    ]
    result = run(small_build, "prune", "prune", overrides, tmp_path)
    weights = load(result.read("weights/model.safetensors"))
    head = weights["head.layers.0.weight"]
    assert (head == 0).mean() == pytest.approx(0.3, abs=1e-3)
    assert (weights["vision.project.weight"] != 0).mean() > 0.99
    assert len(result.manifest.metrics["prune"]["recovery"]["losses"]) == 1


def test_a_component_that_is_not_faster_ships_plain_with_the_reason(small_build: SmallBuild, tmp_path: Path) -> None:
    overrides = ["prune.recovery=null", "engine.minimum_speedup=100"]
    result = run(small_build, "engine", "engine", overrides, tmp_path)
    engine = result.manifest.engine
    assert engine is not None
    assert engine.components["vision"].variant == "plain"
    assert "100× as fast was needed" in engine.components["vision"].reason
    assert "QuantizeLinear" not in operators(result, "vision")
    assert "vision" in result.manifest.metrics["engine"]["kept_plain"]


def test_an_engine_for_another_machine_is_finished_there(
    small_build: SmallBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platform

    from vlaopt.chain import build, finish_here
    from vlaopt.errors import EnvironmentProblem
    from vlaopt.runtime.policy import open as open_policy

    store = Store(tmp_path / "store")
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, "engine.backend=onnxruntime"], target="cpu-arm")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    result = build(recipe, output=tmp_path / "artifacts", store=store)
    finish = result.artifact.manifest.finish
    assert finish is not None
    assert finish.reason == "cpu-arm is aarch64, this machine is x86_64"
    assert result.artifact.manifest.metrics["bench"]["not_measured"].endswith("vlaopt engine ARTIFACT")
    with pytest.raises(EnvironmentProblem, match="cannot be built here: cpu-arm is aarch64"):
        finish_here(result.artifact, store=store, progress=Silent())

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    finished = finish_here(result.artifact, store=store, progress=Silent())
    assert finished.manifest.parent == result.artifact.id
    assert finished.manifest.finish is None
    assert finished.manifest.engine is not None
    assert finished.manifest.engine.machine == "cpu-aarch64"
    assert finish_here(result.artifact, store=store, progress=Silent()).id == finished.id
    assert open_policy(finished.path).backend == "onnxruntime"


@pytest.mark.skipif(
    load_target("cpu-x86-bf16").cpu_lacks(cpu_features()) is not None, reason="this CPU does not compute in bf16"
)
def test_bf16_beside_int8_runs_as_the_plan_says_node_by_node(small_build: SmallBuild, tmp_path: Path) -> None:
    overrides = ["prune.recovery=null", "quantize.floats=bf16", "engine.minimum_speedup=0"]
    result = run(small_build, "quantize", "verify", overrides, tmp_path, target="cpu-x86-bf16")
    engine = result.manifest.engine
    assert engine is not None
    assert engine.backend == "openvino"
    head, vision = engine.components["head"], engine.components["vision"]
    assert (head.facts["computes_in"], head.precisions) == ("bf16", {"int8": 2, "fp32": 1})
    assert vision.precisions["int8"] == 1
    assert vision.precisions["bf16"] >= 20
    assert result.manifest.metrics["verify"]["golden"]["executed"]["mean"] < 0.1
    assert open_artifact(result).predict_chunk(*Golden.of(result).samples[0]).shape == (10, 4)
