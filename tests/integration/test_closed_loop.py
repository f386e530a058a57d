"""Closed-loop success as a gate: the artifact and the eager policy act in the same episodes of the simulator."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, SmallBuild
from vlaopt.artifact.store import Store
from vlaopt.chain import Outcome, run_stage
from vlaopt.errors import GateError
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import get

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="Meta-World is not installed here"),
]
EPISODES = "verify.closed_loop={simulator: metaworld, episodes: 2, seed: 3, tasks: [drawer-close, coffee-button]}"


def verify(built: SmallBuild, folder: Path, *overrides: str) -> Outcome:
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, EPISODES, *overrides])
    source = built.result.outcomes[4].artifact
    return run_stage(get("verify"), recipe, source, store=Store(folder / "store"), progress=Silent())


def test_success_is_measured_beside_the_eager_policy_and_held_to_its_gates(
    small_build: SmallBuild, tmp_path: Path
) -> None:
    result = verify(small_build, tmp_path, "accept.success=0.5", "accept.success_drop=0.5")
    metrics: dict[str, Any] = result.artifact.manifest.metrics["verify"]
    mine, reference = metrics["closed_loop"], metrics["closed_loop"]["reference"]
    assert mine["episodes"] == reference["episodes"] == 4
    assert [task["seeds"] for task in mine["tasks"]] == [task["seeds"] for task in reference["tasks"]]
    gates = {gate["name"] for gate in metrics["gates"]}
    assert {"failure rate in closed loop", "drop of the success rate"} <= gates


def test_a_policy_that_fails_its_episodes_fails_the_build(
    small_build: SmallBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlaopt.runtime.policy import Policy

    monkeypatch.setattr(Policy, "predict", lambda self, observation: self.processors.action_std() * 0)
    with pytest.raises(GateError, match=r"failure rate in closed loop 1 \(limit 0.1\)"):
        verify(small_build, tmp_path, "accept.success=0.9")
