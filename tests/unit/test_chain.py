"""What a stage leaves: a result once it is whole, and till then what it found out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlaopt import stages
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stage
from vlaopt.progress import Progress, Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe
from vlaopt.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Writing(Stage):
    """The first stage, which writes `content` or fails with `error`."""

    content: bytes = b""
    error: BaseException | None = None

    def key_parts(self, recipe: Recipe, source: Artifact | None) -> dict[str, Any]:
        return {"input": None, "recipe": {}, "tools": {}}

    def run(self, recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
        draft.write("reports/it.txt", self.content, "report")
        if self.error is not None:
            raise self.error


def ran(store: Store, stage: Writing, *, anew: bool = False) -> bytes:
    recipe = load_recipe(ROOT / "recipes/edge-vla/cpu.yaml")
    outcome = run_stage(stage, recipe, None, store=store, progress=Silent(), anew=anew)
    return outcome.artifact.read("reports/it.txt")


def test_a_stage_run_anew_replaces_its_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert ran(store, Writing("export", 1, (), content=b"old")) == b"old"
    assert ran(store, Writing("export", 1, (), content=b"new")) == b"old"
    assert ran(store, Writing("export", 1, (), content=b"new"), anew=True) == b"new"


def test_a_stage_interrupted_while_it_runs_anew_keeps_its_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ran(store, Writing("export", 1, (), content=b"old"))
    with pytest.raises(KeyboardInterrupt):
        ran(store, Writing("export", 1, (), content=b"half", error=KeyboardInterrupt()), anew=True)
    assert ran(store, Writing("export", 1, ())) == b"old"


@dataclass(frozen=True)
class Counting(Writing):
    """A stage that adds a line to what it found out, and is interrupted before its third."""

    def run(self, recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
        assert draft.unfinished
        draft.unfinished.parent.mkdir(parents=True, exist_ok=True)
        with draft.unfinished.open("a") as file:
            file.write("a line\n")
        found = draft.unfinished.read_text().splitlines()
        if len(found) < 3:
            raise KeyboardInterrupt
        draft.write("reports/it.txt", str(len(found)).encode(), "report")


def test_what_an_interrupted_stage_found_out_is_there_until_its_result_is(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Counting("export", 1, ())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ran(store, stage)
    assert ran(store, stage) == b"3"
    assert not list(tmp_path.glob("unfinished/**/*.jsonl"))


def test_a_stage_run_anew_forgets_what_it_found_out(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Counting("export", 1, ())
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            ran(store, stage, anew=True)


def key_parts(*overrides: str, stage: str = "quantize") -> dict[str, Any]:
    recipe = load_recipe(ROOT / "recipes/edge-vla/cpu.yaml", overrides=overrides)
    return stages.get(stage).key_parts(recipe, None)


def test_a_search_depends_on_the_limits_and_the_machine_and_a_plan_by_rules_does_not() -> None:
    plain, searched = key_parts(), key_parts("quantize.scheme=mixed")
    assert plain["machine"] is None
    assert "accept" not in plain["recipe"]
    assert key_parts("accept.jerk=0.5") == plain
    assert searched["machine"]
    assert searched["recipe"]["accept"]["jerk"] == 0.05
    assert searched["target"]["backends"] == ["onnxruntime", "openvino"]
    assert key_parts("quantize.scheme=mixed", "accept.jerk=0.5") != searched
    assert key_parts("quantize.scheme=mixed", "bench.hz=7") == searched
