"""A wrong export never passes: each mistake in what an adapter says or cuts fails the build and names the component."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import toy_flow
from tests.integration.conftest import ROOT
from vlaopt import policies
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stage
from vlaopt.errors import GateError, StageError
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import get

FOUND = {
    "swapped keys and values": r"parity of step 0\.\d+ \(limit 0\.0001\)",
    "wrong time embedding": r"parity of step [\d.]+ \(limit 0\.0001\)",
    "backward in time": r"parity of input time of step 1 \(limit 0\.0001\)",
    "too few steps": r"parity of number of calls of step 1 \(limit 0\.0001\)",
    "uniform noise": r"noise law of step: the spec says uniform from 0 to 1, the policy draws normal",
    "state not normalised": r"parity of input state of prefix [\d.]+ \(limit 0\.0001\)",
    "image not normalised": r"parity of input image of vision [\d.]+ \(limit 0\.0001\)",
    "wrong statistics": r"parity of input state of prefix 0\.00\d+ \(limit 0\.0001\)",
    "values under the names of keys": r"parity of input key_00 of step [\d.]+ \(limit 0\.0001\)",
}


@pytest.fixture(autouse=True)
def toy_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")


def test_every_mistake_that_the_toy_can_make_is_looked_for() -> None:
    assert {*FOUND, "step never told of"} == set(toy_flow.MISTAKES)


@pytest.mark.parametrize("mistake", FOUND)
def test_an_export_with_a_mistake_misses_its_gate_and_names_the_component(mistake: str, tmp_path: Path) -> None:
    recipe = load_recipe(toy_flow.make(tmp_path, mistake))
    with pytest.raises(GateError, match=FOUND[mistake]) as raised:
        run_stage(get("export"), recipe, None, store=Store(tmp_path / "store"), progress=Silent())
    assert raised.value.exit_code == 5
    assert "report" in str(raised.value.hint)


def test_a_component_that_the_policy_never_calls_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(toy_flow.make(tmp_path, "step never told of"))
    with pytest.raises(StageError, match="component step was not called by the eager policy"):
        run_stage(get("export"), recipe, None, store=Store(tmp_path / "store"), progress=Silent())


@pytest.mark.parametrize("mistake", ["swapped keys and values", "uniform noise"])
def test_the_command_line_ends_with_five_and_names_the_component(mistake: str, tmp_path: Path) -> None:
    recipe = toy_flow.make(tmp_path, mistake)
    environment = toy_flow.environment(tmp_path / "installed", VLAOPT_STORE=str(tmp_path / "store"), COLUMNS="200")
    command = [sys.executable, "-m", "vlaopt", "build", str(recipe), "--output", str(tmp_path / "artifacts")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=600)
    assert done.returncode == 5, done.stderr
    assert "step" in next(line for line in done.stderr.splitlines() if "error" in line)
    assert done.stdout == ""
    assert not (tmp_path / "artifacts").exists()


SMOLVLA = """
schema: vlaopt.recipe/1
name: tiny-smolvla
version: 1.0.0
target: cpu-x86
policy: {type: smolvla, checkpoint: smolvla/, hub_overrides: {vlm_model_name: vlm/}}
calibration: {path: set, samples: 8}
export: {golden_samples: 2}
"""
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def smolvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny SmolVLA made by LeRobot."""
    lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
    folder = tmp_path_factory.mktemp("smolvla")
    lerobot.make("smolvla", folder / "smolvla")
    lerobot.write_set(folder / "set", "smolvla", 8)
    (folder / "recipe.yaml").write_text(SMOLVLA)
    return folder / "recipe.yaml"


def keys_and_values_swapped_in_the_cut(patch: pytest.MonkeyPatch) -> None:
    from vlaopt.policies.lerobot import flow

    right = flow.rebuilt

    def rebuilt(tensors: Any, layers: Any) -> Any:
        return right([tensor for pair in zip(tensors[1::2], tensors[0::2], strict=True) for tensor in pair], layers)

    patch.setattr(flow, "rebuilt", rebuilt)


def keys_and_values_swapped_in_the_graph(patch: pytest.MonkeyPatch) -> None:
    from vlaopt.policies import portable

    right = portable.export_component

    def export(module: Any, inputs: Any, outputs: list[str], **options: Any) -> Any:
        swapped = {"key_00": "value_00", "value_00": "key_00"}
        return right(module, inputs, [swapped.get(name, name) for name in outputs], **options)

    patch.setattr(portable, "export_component", export)


def another_embedding_of_time(patch: pytest.MonkeyPatch) -> None:
    from vlaopt.policies.lerobot import smolvla_parts

    right = smolvla_parts.Step.forward

    def forward(self: Any, noisy_actions: Any, time: Any, mask: Any, *cache: Any) -> Any:
        return right(self, noisy_actions, time * 1.01, mask, *cache)

    patch.setattr(smolvla_parts.Step, "forward", forward)


def noise_from_a_uniform_law(patch: pytest.MonkeyPatch) -> None:
    described(patch, lambda spec: {"noise": spec.noise.model_copy(update={"law": "uniform"})})


def time_from_zero_to_one(patch: pytest.MonkeyPatch) -> None:
    described(patch, lambda spec: {"loop": spec.loop.model_copy(update={"start": 0.0, "end": 1.0})})


def a_state_that_is_not_normalised(patch: pytest.MonkeyPatch) -> None:
    def changed(spec: Any) -> dict[str, Any]:
        steps = [step.model_copy(update={"mode": "identity"}) for step in spec.preprocess if step.kind == "normalise"]
        others = [step for step in spec.preprocess if step.kind != "normalise"]
        return {"preprocess": (*others, *steps)}

    described(patch, changed)


def described(patch: pytest.MonkeyPatch, changed: Callable[[Any], dict[str, Any]]) -> None:
    """What the adapter says of SmolVLA, with some fields of its spec changed."""
    from vlaopt.policies.lerobot.smolvla import EagerSmolVLA

    right = EagerSmolVLA.describe

    def describe(self: Any) -> Any:
        spec = right(self)
        return spec.model_copy(update=changed(spec))

    patch.setattr(EagerSmolVLA, "describe", describe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        (keys_and_values_swapped_in_the_cut, r"parity of step [\d.]+ \(limit"),
        (keys_and_values_swapped_in_the_graph, r"parity of prefix [\d.]+ \(limit"),
        (another_embedding_of_time, r"parity of step [\d.]+ \(limit"),
        (noise_from_a_uniform_law, r"noise law of step: the spec says uniform from 0 to 1, the policy draws normal"),
        (time_from_zero_to_one, r"parity of input time of step 1 \(limit"),
        (a_state_that_is_not_normalised, r"parity of input state of prefix [\d.]+ \(limit"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_in_smolvla_is_found_and_names_the_component(
    mistake: Patch, found: str, smolvla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(GateError, match=found) as raised:
        run_stage(get("export"), load_recipe(smolvla), None, store=Store(tmp_path / "store"), progress=Silent())
    assert raised.value.exit_code == 5
