"""Faults planted in the quantization of a small policy: each is caught, and the message names the place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ignores_int8, toy_flow
from vlaopt import backends, policies
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stages
from vlaopt.errors import StageError
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe
from vlaopt.stages import ORDER

INT8 = ("quantize.scheme=int8", "engine.threads=1", "engine.minimum_speedup=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy checkpoint with its recipe; its type and the backend that ignores int8 are known in this process."""
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        patch.setitem(backends.BUILT_IN, ignores_int8.BACKEND.name, "tests.ignores_int8")
        yield made


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
    recipe = deaf(load_recipe(folder / "recipe.yaml", overrides=INT8))
    expected = (
        rf"ignores-int8 runs 2 of 2 layers of vision in {kind} that were planned in int8: vision.body, vision.stem"
    )
    with pytest.raises(StageError, match=expected) as raised:
        until("engine", folder, recipe=recipe)
    assert "engine.allow_shortfall" in str(raised.value.hint)


def test_a_shortfall_that_is_allowed_is_in_the_report(folder: Path) -> None:
    recipe = deaf(load_recipe(folder / "recipe.yaml", overrides=[*INT8, "engine.allow_shortfall=1"]))
    report = json.loads(until("engine", folder, recipe=recipe).read("reports/engine.json"))
    others = {"body/Conv": "fp32", "stem/Conv": "fp32"}
    assert report["audit"]["vision"] == {"planned": 2, "kept": 0, "others": others}
    assert report["layers"]["vision"] == others


def test_a_backend_that_keeps_to_the_plan_passes_the_audit(folder: Path) -> None:
    report = json.loads(until("engine", folder, *INT8).read("reports/engine.json"))
    kept = {name: (found["kept"], found["others"]) for name, found in report["audit"].items()}
    assert kept == {"vision": (2, {}), "prefix": (5, {}), "step": (8, {})}
    assert report["layers"]["vision"] == {"body/Conv": "int8", "stem/Conv": "int8"}


def deaf(recipe: Recipe) -> Recipe:
    """The recipe for a target whose only backend ignores int8."""
    target = recipe.target.model_copy(update={"backends": (ignores_int8.BACKEND.name,)})
    return recipe.model_copy(update={"target": target})
