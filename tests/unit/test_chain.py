"""Stages run anew replace their stored result only once the new one is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
