"""Faults planted in the quantization of a small policy: each is caught, and the message names the place."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests import ignores_int8, toy_flow
from vlaopt import backends, policies
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stages
from vlaopt.cli.app import run
from vlaopt.errors import GateError, InputError, StageError
from vlaopt.progress import Silent
from vlaopt.quantization.case import Case, written_graphs
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe
from vlaopt.stages import ORDER

INT8 = ("quantize.scheme=int8", "engine.threads=1", "engine.minimum_speedup=0")
TIGHT = "accept.action_error.mean=0.05"
"""A limit that the policy as it is passes in int8."""
OUTLIER = (*INT8, "policy.checkpoint=outlier")
LOOSE = (*OUTLIER, "accept.action_error.mean=5", "accept.jerk=9")
CHANNEL = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy checkpoint, one with an outlier, and a recipe; what they need is known in this process."""
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    plant_outlier(made / "checkpoint", made / "outlier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        patch.setitem(backends.BUILT_IN, ignores_int8.BACKEND.name, "tests.ignores_int8")
        yield made


def plant_outlier(checkpoint: Path, place: Path) -> None:
    """A copy of a checkpoint whose step computes the same, one channel between two layers 1000 times as large."""
    shutil.copytree(checkpoint, place)
    weights = load_file(place / "model.safetensors")
    for key, index, factor in (
        ("step.wide.1.weight", np.s_[CHANNEL], 1000),
        ("step.wide.1.bias", np.s_[CHANNEL], 1000),
        ("step.narrow.1.weight", np.s_[:, CHANNEL], 1 / 1000),
    ):
        weights[key][index] *= np.float32(factor)
    save_file(weights, place / "model.safetensors")


def until(stage: str, folder: Path, *overrides: str, recipe: Recipe | None = None) -> Artifact:
    """The result of a stage, from the module's store where it is there."""
    loaded = recipe or load_recipe(folder / "recipe.yaml", overrides=overrides)
    names = ORDER[: ORDER.index(stage) + 1]
    return run_stages(loaded, None, names, store=Store(folder / "store"), progress=Silent())[-1].artifact


@pytest.mark.parametrize(("names_layers", "kind"), [(True, "fp32"), (False, "unknown precision")])
def test_a_backend_that_ignores_int8_fails_the_audit_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, names_layers: bool, kind: str
) -> None:
    monkeypatch.setattr(ignores_int8.BACKEND, "names_layers", names_layers)
    recipe = deaf(load_recipe(folder / "recipe.yaml", overrides=LOOSE))
    expected = (
        rf"ignores-int8 runs 2 of 2 layers of vision in {kind} that were planned in int8: vision.body, vision.stem"
    )
    with pytest.raises(StageError, match=expected) as raised:
        until("engine", folder, recipe=recipe)
    assert "engine.allow_shortfall" in str(raised.value.hint)


def test_a_shortfall_that_is_allowed_is_in_the_report(folder: Path) -> None:
    recipe = deaf(load_recipe(folder / "recipe.yaml", overrides=[*LOOSE, "engine.allow_shortfall=1"]))
    built = until("engine", folder, recipe=recipe)
    report = json.loads(built.read("reports/engine.json"))
    others = {"body/Conv": "fp32", "stem/Conv": "fp32"}
    assert report["audit"]["vision"] == {"planned": 2, "kept": 0, "others": others}
    assert report["layers"]["vision"] == others
    line = "0 of 2 layers planned in low precision run in it; not body/Conv in fp32, stem/Conv in fp32"
    assert line in told("inspect", str(built.path))


def test_a_backend_that_keeps_to_the_plan_passes_the_audit(folder: Path) -> None:
    built = until("engine", folder, *LOOSE, "engine.backend=onnxruntime")
    report = json.loads(built.read("reports/engine.json"))
    planned = {name: counts["int8"] for name, counts in built.manifest.metrics["onnx"]["layers"].items()}
    assert {name: found["kept"] for name, found in report["audit"].items()} == planned
    assert all(found["planned"] == planned[name] and not found["others"] for name, found in report["audit"].items())
    assert report["layers"]["vision"] == {"body/Conv": "int8", "stem/Conv": "int8"}


def deaf(recipe: Recipe) -> Recipe:
    """The recipe for a target whose only backend ignores int8."""
    target = recipe.target.model_copy(update={"backends": (ignores_int8.BACKEND.name,)})
    return recipe.model_copy(update={"target": target})


@pytest.mark.slow
def test_the_policy_without_a_fault_passes(folder: Path) -> None:
    until("onnx", folder, *INT8, TIGHT)


def test_an_outlier_channel_misses_the_gate_and_is_diagnosed_by_layer_and_channel(folder: Path) -> None:
    with pytest.raises(GateError, match="the result of onnx is beyond its limits: mean action error") as raised:
        until("onnx", folder, *OUTLIER, TIGHT)
    assert "vlaopt diagnose RECIPE" in str(raised.value.hint)
    found = diagnosed(folder, *OUTLIER, TIGHT)
    scopes = {part["scope"]: part for part in found["guilty"][:2]}
    assert scopes.keys() == {"step.step.wide.1", "step.step.narrow.1"}
    for part in scopes.values():
        assert part["causes"][0]["kind"] == "outlier channel"
        assert part["causes"][0]["told"].startswith(f"channel {CHANNEL} of step/Relu_2 reaches")
    smoothed = next(mend for mend in found["mends"] if mend["lines"] == "quantize:\n  smooth: 0.5")
    assert smoothed["held"]
    mend = found["mends"][-1]
    assert mend["held"] and not found["held"]
    assert '{scope: "step.step.narrow.1", scheme: fp32}' in mend["lines"]


def test_the_lines_that_diagnose_prints_mend_the_build(folder: Path) -> None:
    lines = yaml.safe_load(diagnosed(folder, *OUTLIER, TIGHT)["mends"][-1]["lines"])
    kept = [{"scope": "*", "scheme": "int8"}]
    until("onnx", folder, *OUTLIER, TIGHT, f"quantize.rules={json.dumps(kept + lines['quantize']['rules'])}")


@pytest.mark.slow
def test_an_artifact_is_diagnosed_where_it_was_built_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    built = until("engine", folder, *LOOSE, "engine.backend=openvino")
    found = diagnosed(folder, source=built.path)
    assert (found["backend"], found["held"]) == ("openvino", True)
    assert found["guilty"][0]["scope"] == "step.step.narrow.1"
    assert found["audit"]["vision"] == {"planned": 2, "kept": 2, "others": {}}
    with pytest.raises(InputError, match="the store does not have the FP32 graphs") as raised:
        written_graphs(built, Store(tmp_path / "elsewhere"))
    assert "vlaopt diagnose RECIPE" in str(raised.value.hint)


def test_what_is_not_quantized_is_not_diagnosed(folder: Path) -> None:
    with pytest.raises(InputError, match="nothing in it is quantized"):
        Case.of(until("onnx", folder, "policy.checkpoint=outlier"))
    with pytest.raises(InputError, match="it is of stage prune, before anything is quantized"):
        written_graphs(until("prune", folder, "policy.checkpoint=outlier"), Store(folder / "store"))


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ('[{scope: "*", scheme: fp32}]', r"vision\.stem: rule \*; vision\.body: rule \*"),
        ("[]", r"vision\.stem: \d+ multiply-adds per value: too few, 8-bit pays from 32; "),
    ],
)
def test_a_plan_that_quantizes_nothing_is_refused_with_the_reasons(folder: Path, rules: str, why: str) -> None:
    with pytest.raises(
        InputError, match=rf"scheme int8 changes nothing, all \d+ layers stay in FP32 \({why}"
    ) as raised:
        until("quantize", folder, *OUTLIER, f"quantize.rules={rules}")
    assert str(raised.value.where).endswith("recipe.yaml:quantize")


@pytest.mark.slow
def test_a_calibration_set_of_the_wrong_camera_is_diagnosed_as_other_data(folder: Path) -> None:
    toy_flow.write_set(folder / "dark", [dark(toy_flow.observation(index)) for index in range(12)])
    overrides = (*INT8, TIGHT, "calibration.path=dark", "verify.observations=set", "verify.samples=8")
    # Not whichever is fastest: OpenVINO's symmetric codes of dark, hence negative, pictures cover bright ones too.
    overrides += ("engine.backend=onnxruntime",)
    with pytest.raises(GateError, match="held_out: mean action error") as raised:
        until("verify", folder, *overrides)
    assert "vlaopt diagnose RECIPE" in str(raised.value.hint)
    found = diagnosed(folder, *overrides)
    assert found["observed_on"] == "held-out"
    assert found["guilty"][0]["scope"] == "vision.stem"
    assert found["guilty"][0]["causes"][0]["kind"] == "other data"
    assert "of image lie beyond the range that was calibrated" in found["guilty"][0]["causes"][0]["told"]
    assert found["mends"][0]["lines"].startswith("calibration:")
    assert found["mends"][0]["held"]


def dark(observation: dict[str, Any]) -> dict[str, Any]:
    """What a camera with a closed iris would see."""
    return {**observation, toy_flow.CAMERA: observation[toy_flow.CAMERA] // 16}


def told(*arguments: str) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(list(arguments)) == 0
    return out.getvalue()


def diagnosed(folder: Path, *overrides: str, source: Path | None = None) -> Any:
    """What `vlaopt diagnose` says of the recipe, or of an artifact, as JSON."""
    settings = [argument for override in overrides for argument in ("--set", override)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAOPT_STORE", str(folder / "store"))
        return json.loads(told("diagnose", str(source or folder / "recipe.yaml"), *settings, "--json"))
