"""On a GPU: an x86-rtx artifact's own engine opens, gives the golden actions within its gates, and is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import RTX, SMALL
from vlaopt import backends
from vlaopt.artifact.store import Store
from vlaopt.chain import build
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import open_artifact
from vlaopt.stages import golden_error, limits

RTX_BACKEND = backends.get("tensorrt-rtx")
REASON = RTX_BACKEND.missing() or RTX_BACKEND.runnable()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def test_the_engine_gives_the_golden_actions_and_is_measured(tmp_path: Path) -> None:
    recipe = load_recipe(RTX, overrides=SMALL)
    artifact = build(recipe, output=tmp_path / "artifacts", store=Store(tmp_path / "store")).artifact
    policy = open_artifact(artifact)
    assert policy.backend == "tensorrt-rtx"
    error = golden_error(policy, Golden.of(artifact), Silent(), "golden")
    assert all(gate.held for gate in limits(error, recipe.accept))
    assert artifact.manifest.metrics["verify"]["engine_not_run"] is None
    assert artifact.manifest.metrics["bench"]["paced_p50_ms"] > 0
