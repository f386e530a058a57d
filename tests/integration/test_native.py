"""The promise: native code is built and tried in a process of its own; a kill costs little; a stranger's is refused."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlaopt
from tests import native_fake, toy_flow
from vlaopt import policies
from vlaopt.artifact.artifact import Artifact, copy
from vlaopt.artifact.store import Store
from vlaopt.chain import finish_here, run_stages
from vlaopt.errors import EnvironmentProblem, GateError, InputError, StageError
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import ORDER
from vlaopt.stages.bench import why_not_measured

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="child processes are ended by the kernel here")

COMPONENTS = ("vision", "prefix", "step")
INT8 = ("quantize.scheme=int8", "engine.minimum_speedup=0")
TARGET = """
schema: vlaopt.target/1
name: {name}
kind: gpu
arch: {arch}
backends: [{backend}]
compute_capabilities: ["8.7"]
precisions: [fp32, fp16, int8]
engine_built_on: target
"""
ELSEWHERE = {"machine": {"sm": "9.0"}}
"""A machine whose GPU is not the target's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy checkpoint, recipe and targets; the backends and the policy are installed for this process."""
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    for name, backend in (("board", "native-fake"), ("untimed", "untimed-fake")):
        text = TARGET.format(name=name, backend=backend, arch=platform.machine())
        (made / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(native_fake.install(made)))
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        patch.setattr("vlaopt.stages.engine.ROUNDS", 2)
        patch.setattr("vlaopt.stages.engine.ITERATIONS", 2)
        yield made


Tell = Callable[..., Path]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Sets what the fake does from now on; gives its log. The store of this test is the user's."""
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "store"))

    def said(**values: Any) -> Path:
        log = tmp_path / "log"
        monkeypatch.setenv(native_fake.VARIABLE, json.dumps({"log": str(log), **values}))
        return log

    said()
    return said


def graphs(folder: Path, overrides: tuple[str, ...], target: str) -> Artifact:
    """The result of stage `onnx`, made once in the module's store, whatever is asked of later stages."""
    overrides = tuple(override for override in overrides if override.startswith("quantize."))
    recipe = load_recipe(folder / "recipe.yaml", target=str(folder / f"{target}.yaml"), overrides=overrides)
    names = ORDER[: ORDER.index("onnx") + 1]
    return run_stages(recipe, None, names, store=Store(folder / "store"), progress=Silent())[-1].artifact


def engine(folder: Path, *overrides: str, target: str = "board") -> Artifact:
    """The result of stage `engine` in the user's store."""
    recipe = load_recipe(folder / "recipe.yaml", target=str(folder / f"{target}.yaml"), overrides=overrides)
    source = graphs(folder, overrides, target)
    return run_stages(recipe, source, ["engine"], store=Store.default(), progress=Silent())[-1].artifact


def unfinished(folder: Path, tell: Tell) -> Artifact:
    """The artifact as a machine of another kind leaves it."""
    tell(**ELSEWHERE)
    artifact = engine(folder)
    assert artifact.manifest.finish is not None
    assert artifact.manifest.finish.reason == "native-fake: board is SM 8.7, the GPU here is 9.0"
    tell()
    return artifact


def builds(log: Path) -> list[int]:
    """The processes that built, one for each form."""
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("build")]


def left() -> list[str]:
    """What a stage left for the next process."""
    root = Store.default().root / "unfinished"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("form.json"))


def test_each_form_is_built_in_a_process_of_its_own(folder: Path, tell: Tell) -> None:
    log = tell()
    artifact = engine(folder, *INT8)
    processes = builds(log)
    assert len(processes) == len(set(processes)) == 2 * len(COMPONENTS)
    assert os.getpid() not in processes
    found = artifact.manifest.engine
    assert found is not None
    assert found.machine.startswith(f"gpu-{platform.machine()}-sm87-native-fake-")
    for component in found.components.values():
        assert component.needs == {"sm": "8.7"}
        assert component.variant == "quantized"
        assert component.facts["process"] in processes
    assert left() == []
    assert vlaopt.open(artifact.path).predict_chunk(toy_flow.observation(0)).shape == (8, 3)


def test_a_killed_build_goes_on_where_it_was(folder: Path, tell: Tell) -> None:
    log = tell(die_at_build=3, signal="SIGKILL")
    with pytest.raises(
        StageError, match=r"building \w+ \(plain\) on native-fake was killed, probably for memory"
    ) as told:
        engine(folder)
    assert "the fake was told to die" in str(told.value)
    assert len(left()) == 2
    assert not list(Store.default().root.glob("stages/engine/*"))
    engine(folder)
    assert len(builds(log)) == len(COMPONENTS) + 1
    assert left() == []


def test_a_form_that_was_changed_is_built_again(folder: Path, tell: Tell) -> None:
    log = tell(die_at_build=2, signal="SIGSEGV")
    with pytest.raises(StageError, match=r"crashed \(SIGSEGV\); the last it wrote: the fake was told to die"):
        engine(folder)
    damaged = next(Store.default().root.glob("unfinished/**/model.onnx"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    engine(folder)
    assert len(builds(log)) == len(COMPONENTS) + 2


def test_an_engine_that_crashes_as_it_opens_is_an_error_and_is_not_kept(folder: Path, tell: Tell) -> None:
    tell(die_at="open", signal="SIGSEGV")
    with pytest.raises(StageError, match=r"running the engines on native-fake crashed \(SIGSEGV\)"):
        engine(folder)
    assert left() == []
    tell(refuse="open")
    with pytest.raises(EnvironmentProblem, match="the engine does not load"):
        engine(folder)
    assert left() == []


def test_what_misses_a_gate_is_not_kept(folder: Path, tell: Tell) -> None:
    with pytest.raises(GateError, match="too far from the reference"):
        engine(folder, "accept.action_error.mean=1e-9")
    assert left() == []


def test_too_little_memory_is_told_before_the_build(folder: Path, tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tell()
    with pytest.raises(
        EnvironmentProblem, match=r"[0-9]{9,} MiB of memory are needed to build the engine, [0-9]+ are free"
    ):
        engine(folder, "engine.tensorrt.workspace_mib=999999999")
    assert not log.exists()


def test_a_setting_that_the_backend_does_not_know_is_refused(folder: Path, tell: Tell) -> None:
    with pytest.raises(InputError, match="native-fake has no setting 'version_compatible'"):
        engine(folder, "engine.tensorrt.version_compatible=true")


def test_a_backend_without_times_ships_quantized_and_is_not_measured(folder: Path, tell: Tell) -> None:
    artifact = engine(folder, *INT8, target="untimed")
    found = artifact.manifest.engine
    assert found is not None
    assert {component.variant for component in found.components.values()} == {"quantized"}
    assert "not measured" in found.components["step"].reason
    assert artifact.manifest.metrics["engine"]["candidates_p50_ms"] == {}
    assert artifact.manifest.metrics["engine"]["action_error"]["samples"] == 4
    assert why_not_measured(artifact) is not None


def test_an_artifact_is_finished_once_and_found_again(folder: Path, tell: Tell, tmp_path: Path) -> None:
    artifact = unfinished(folder, tell)
    with pytest.raises(EnvironmentProblem, match="is not built yet"):
        vlaopt.open(artifact.path)
    log = tell()
    finished = finish_here(artifact, store=Store.default(), progress=Silent())
    assert finished.manifest.parent == artifact.id
    count = len(builds(log))
    assert finish_here(artifact, store=Store.default(), progress=Silent()).id == finished.id
    assert len(builds(log)) == count
    policy = vlaopt.open(artifact.path)
    assert policy.backend == "native-fake"
    expected = vlaopt.open(artifact.path, backend="onnxruntime").predict_chunk(toy_flow.observation(0))
    assert np.allclose(policy.predict_chunk(toy_flow.observation(0)), expected, atol=1.0)
    # another machine has another key
    tell(machine={"gpu": "Other"})
    with pytest.raises(EnvironmentProblem, match="is not built yet"):
        vlaopt.open(artifact.path)


def test_native_code_of_another_machine_opens_only_when_it_is_trusted(
    folder: Path, tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = copy(engine(folder), tmp_path / "published")
    assert vlaopt.open(published.path).backend == "native-fake"  # built here: no word needed
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "other"))
    log = tell()
    before = log.read_text()
    with pytest.raises(InputError, match="native code that this machine did not build") as refused:
        vlaopt.open(published.path)
    assert "--trust" in (refused.value.hint or "")
    recipe = load_recipe(folder / "recipe.yaml", target=str(folder / "board.yaml"))
    with pytest.raises(InputError, match="native code that this machine did not build"):
        run_stages(recipe, published, ["verify"], store=Store.default(), progress=Silent())
    assert log.read_text() == before
    assert vlaopt.open(published.path, trust=True).backend == "native-fake"
    assert vlaopt.open(published.path, backend="onnxruntime").backend == "onnxruntime"


def test_an_engine_that_does_not_fit_this_machine_is_refused_before_it_is_looked_at(
    folder: Path, tell: Tell, tmp_path: Path
) -> None:
    finished = finish_here(unfinished(folder, tell), store=Store.default(), progress=Silent())
    log = tell(**ELSEWHERE)
    before = log.read_text()
    with pytest.raises(EnvironmentProblem, match=r"sm 8\.7 is needed, 9\.0 is here") as refused:
        vlaopt.open(finished.path, trust=True)
    assert f"from the artifact {finished.manifest.parent[:12]}" in (refused.value.hint or "")
    assert log.read_text() == before
