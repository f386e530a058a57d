"""One plan becomes a graph for every kind of backend of the target; what ships is the one its engine was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, SmallBuild
from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import component_path, placed_path
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stages
from vlaopt.graph.check import load
from vlaopt.progress import Silent
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.quantization.structure import quantized_layers, structural_check
from vlaopt.recipe.load import load_recipe


@pytest.fixture
def written(small_build: SmallBuild) -> Artifact:
    """The result of stage `onnx`."""
    return next(outcome.artifact for outcome in small_build.result.outcomes if outcome.stage == "onnx")


def test_the_plan_is_written_for_every_kind_of_backend_of_the_target(written: Artifact) -> None:
    for component in ("vision", "head"):
        own, placed = (
            load(written.graph(path)) for path in (component_path(component), placed_path("openvino", component))
        )
        structural_check(own, "onnxruntime")
        structural_check(placed, "openvino")
        assert quantized_layers(own) == quantized_layers(placed) != []
    assert not written.has(placed_path("openvino", "language")), "nothing in it is quantized"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_portable_graph_that_ships_is_the_one_that_was_compiled(
    written: Artifact, tmp_path: Path, backend: str
) -> None:
    if reason := backends.get(backend).missing():
        pytest.skip(reason)
    overrides = [*NO_RECOVERY, f"engine.backend={backend}", "engine.minimum_speedup=0"]
    recipe = load_recipe(CPU, overrides=overrides)
    [outcome] = run_stages(recipe, written, ["engine"], store=Store(tmp_path), progress=Silent())
    finished = outcome.artifact
    assert finished.manifest.engine is not None
    assert finished.manifest.engine.components["vision"].variant == "quantized"
    source = placed_path("openvino", "vision") if backend == "openvino" else component_path("vision")
    assert finished.graph(component_path("vision")) == written.graph(source)
    assert not finished.manifest.by_role("placed", "plain")


def test_an_artifact_that_is_finished_elsewhere_keeps_what_any_backend_there_may_take(
    written: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    recipe = load_recipe(CPU, overrides=NO_RECOVERY)
    [outcome] = run_stages(recipe, written, ["engine"], store=Store(tmp_path), progress=Silent())
    assert outcome.artifact.manifest.finish is not None
    kept = {entry.path for entry in outcome.artifact.manifest.by_role("placed")}
    assert kept == {placed_path("openvino", name) for name in ("vision", "head")}


@pytest.mark.parametrize("smooth", [None, 0.25])
def test_biases_are_corrected_by_default_and_loud_channels_move_where_asked(
    small_build: SmallBuild, tmp_path: Path, smooth: float | None
) -> None:
    source = next(outcome.artifact for outcome in small_build.result.outcomes if outcome.stage == "prune")
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, *([f"quantize.smooth={smooth}"] if smooth else [])])
    outcomes = run_stages(recipe, source, ["quantize", "onnx"], store=Store(tmp_path), progress=Silent())
    artifact = outcomes[-1].artifact
    plan = QuantizationPlan.from_json(artifact.read("policy/quantization.json"), where="plan")
    assert plan.components["vision"].means
    assert list(plan.components["head"].smoothing) == (["layers.1/Relu"] if smooth else [])
    assert artifact.manifest.metrics["onnx"]["parity"]["simplified graphs"] <= 1e-4
