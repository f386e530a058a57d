"""What an engine depends on of the CPU: the threads that pay there, and the features that its target asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlaopt
from tests import toy_flow
from vlaopt import policies
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.benchmark import environment
from vlaopt.benchmark.threads import WORTH
from vlaopt.chain import finish_here, run_stages
from vlaopt.errors import EnvironmentProblem
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import ORDER

LACKS = "cpu-x86-vnni needs a CPU with avx512_vnni or avx_vnni, which this one lacks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy checkpoint with its recipe, its type known in this process."""
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        yield made


def engine(folder: Path, *overrides: str, target: str | None = None) -> Artifact:
    """The result of stage engine, from the module's store where it is there."""
    recipe = load_recipe(folder / "recipe.yaml", overrides=overrides, target=target)
    names = ORDER[: ORDER.index("engine") + 1]
    return run_stages(recipe, None, names, store=Store(folder / "store"), progress=Silent())[-1].artifact


def test_the_threads_that_pay_are_in_the_artifact_and_why_in_its_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 2)
    monkeypatch.setattr("vlaopt.stages.engine.ROUNDS", 2)
    monkeypatch.setattr("vlaopt.stages.engine.ITERATIONS", 2)
    artifact = engine(folder, "engine.threads=auto", "engine.backend=onnxruntime")
    found = artifact.manifest.engine
    assert found is not None
    seen = json.loads(artifact.read("reports/engine.json"))["thread_speedups"]
    assert seen.keys() == {"onnxruntime"}
    assert seen["onnxruntime"].keys() == {"2"}
    assert found.threads == (2 if seen["onnxruntime"]["2"] >= WORTH else 1)
    assert vlaopt.open(artifact.path).backend == found.backend


def test_where_threads_are_given_none_are_measured(folder: Path) -> None:
    artifact = engine(folder, "engine.threads=1")
    assert artifact.manifest.engine is not None
    assert artifact.manifest.engine.threads == 1
    assert not any(json.loads(artifact.read("reports/engine.json"))["thread_speedups"].values())


def test_a_cpu_that_lacks_what_its_target_needs_gets_the_portable_graphs_and_finishes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cpu_features", lambda: frozenset({"avx2"}))
    artifact = engine(folder, target="cpu-x86-vnni")
    assert artifact.manifest.engine is None
    assert artifact.manifest.finish is not None
    assert artifact.manifest.finish.reason == LACKS
    store = Store(folder / "store")
    with pytest.raises(EnvironmentProblem, match=LACKS):
        finish_here(artifact, store=store, progress=Silent())
    monkeypatch.setattr(environment, "cpu_features", lambda: frozenset({"avx2", "avx_vnni"}))
    finished = finish_here(artifact, store=store, progress=Silent())
    assert vlaopt.open(finished.path).predict_chunk(toy_flow.observation(0)).shape == (8, 3)
    monkeypatch.setattr(environment, "cpu_features", lambda: frozenset({"avx2"}))
    with pytest.raises(EnvironmentProblem, match=LACKS):
        vlaopt.open(finished.path)
