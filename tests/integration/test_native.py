"""The promise: native code is built and tried in a process of its own; a kill costs little; a stranger's is refused."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlaopt
from tests import board, native_fake
from vlaopt.artifact.artifact import Artifact, copy
from vlaopt.artifact.store import Store
from vlaopt.chain import finish_here, run_stages
from vlaopt.errors import EnvironmentProblem, GateError, InputError, StageError
from vlaopt.progress import Silent
from vlaopt.stages.bench import why_not_measured

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="child processes are ended by the kernel here")

ELSEWHERE = {"machine": {"sm": "9.0"}}
"""A machine whose GPU is not the target's."""

Tell = Callable[..., Path]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Installs the fake and sets what it does from now on; gives its log. The store of this test is the user's."""
    monkeypatch.syspath_prepend(str(native_fake.install(tmp_path / "installed")))
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("vlaopt.stages.engine.ROUNDS", 2)
    monkeypatch.setattr("vlaopt.stages.engine.ITERATIONS", 2)

    def said(**values: Any) -> Path:
        log = tmp_path / "log"
        monkeypatch.setenv(native_fake.VARIABLE, json.dumps({"log": str(log), **values}))
        return log

    said()
    return said


def engine(folder: Path, *overrides: str, backend: str = "native-fake") -> Artifact:
    """The result of stage `engine` in the user's store."""
    graphs = folder / backend
    source = (
        Artifact.open(graphs / "artifact") if graphs.exists() else board.make(graphs, backend=backend, stage="onnx")
    )
    recipe = board.recipe(graphs, backend, *overrides)
    return run_stages(recipe, source, ["engine"], store=Store.default(), progress=Silent())[-1].artifact


def builds(log: Path) -> list[int]:
    """The processes that built, one for each form."""
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("build")]


def gone(process: int) -> bool:
    """Whether a process ends within seconds; one that nobody has waited for counts as ended."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        try:
            if status.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def left() -> list[str]:
    """What a stage left for the next process, and what nobody takes up."""
    root = Store.default().root
    found = [*root.glob("unfinished/**/form.json"), *root.glob("**/.staging-*")]
    return sorted(path.relative_to(root).parts[-2] for path in found)


def test_each_form_is_built_in_a_process_of_its_own(tell: Tell, tmp_path: Path) -> None:
    log = tell()
    artifact = engine(tmp_path)
    processes = builds(log)
    assert len(set(processes)) == len(processes) == 2
    assert os.getpid() not in processes
    found = artifact.manifest.engine
    assert found is not None
    assert found.machine.startswith(f"gpu-{platform.machine()}-sm87-native-fake-")
    assert found.components["arm"].variant == "quantized"
    assert found.components["arm"].needs == {"sm": "8.7"}
    assert found.components["arm"].facts["process"] in processes
    assert left() == []
    assert vlaopt.open(artifact.path).predict_chunk(board.observation()).shape == (board.CHUNK, board.ACTIONS)


def test_a_crashed_build_goes_on_where_it_was(tell: Tell, tmp_path: Path) -> None:
    log = tell(die_at_build=2, signal="SIGSEGV")
    with pytest.raises(StageError, match=r"the builder of native-fake crashed \(SIGSEGV\)") as died:
        engine(tmp_path)
    assert str(died.value).startswith("arm (plain): ")
    assert "the fake was told to die" in str(died.value)
    assert "what was built already is kept" in (died.value.hint or "")
    assert left() == ["quantized"]
    assert not list(Store.default().root.glob("stages/engine/*"))
    engine(tmp_path)
    assert len(builds(log)) == 3
    assert left() == []


@pytest.mark.slow
def test_a_form_that_was_changed_is_built_again(tell: Tell, tmp_path: Path) -> None:
    log = tell(die_at_build=2, signal="SIGKILL")
    with pytest.raises(StageError, match="was killed, probably for memory"):
        engine(tmp_path)
    damaged = next(Store.default().root.glob("unfinished/**/model.onnx"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    engine(tmp_path)
    assert len(builds(log)) == 4


def test_a_killed_command_goes_on_where_it_was(tell: Tell, tmp_path: Path) -> None:
    artifact = board.make(tmp_path / "made", backend="native-fake")
    log = tell(kill_at_build=2)
    paths = os.pathsep.join([str(tmp_path / "installed"), str(board.ROOT)])
    command = [sys.executable, "-m", "vlaopt", "engine", str(artifact.path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert all(gone(process) for process in builds(log))
    finished = finish_here(artifact, store=Store.default(), progress=Silent())
    assert finished.manifest.parent == artifact.id
    assert len(builds(log)) == 3
    Store.default().collect(older_than_days=1)
    assert left() == []


@pytest.mark.slow
def test_an_engine_that_cannot_run_is_an_error_and_is_not_kept(tell: Tell, tmp_path: Path) -> None:
    tell(die_at="open", signal="SIGSEGV")
    with pytest.raises(StageError, match=r"running on native-fake crashed \(SIGSEGV\)"):
        engine(tmp_path)
    assert left() == []
    tell(refuse="open")
    with pytest.raises(EnvironmentProblem, match="the engine does not load"):
        engine(tmp_path)
    assert left() == []
    tell()
    with pytest.raises(GateError, match="too far from the reference"):
        engine(tmp_path, "accept.action_error.mean=1e-9")
    assert left() == []


def test_too_little_memory_is_told_before_the_build(tell: Tell, tmp_path: Path) -> None:
    log = tell()
    with pytest.raises(EnvironmentProblem, match=r"[0-9]{9,} MiB of memory are needed to build the engine, [0-9]+ are"):
        engine(tmp_path, "engine.tensorrt.workspace_mib=999999999")
    assert not log.exists()


def test_a_setting_that_the_backend_does_not_know_is_refused(tell: Tell, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="native-fake has no setting 'version_compatible'"):
        engine(tmp_path, "engine.tensorrt.version_compatible=true")


@pytest.mark.slow
def test_a_backend_without_times_ships_quantized_and_is_not_measured(tell: Tell, tmp_path: Path) -> None:
    artifact = engine(tmp_path, "engine.minimum_speedup=100", backend="untimed-fake")
    found = artifact.manifest.engine
    assert found is not None
    assert found.components["arm"].variant == "quantized"
    assert "not measured" in found.components["arm"].reason
    assert artifact.manifest.metrics["engine"]["candidates_p50_ms"] == {}
    assert artifact.manifest.metrics["engine"]["action_error"]["samples"] == 4
    assert why_not_measured(artifact) is not None


@pytest.mark.slow
def test_an_artifact_is_finished_once_and_found_again(tell: Tell, tmp_path: Path) -> None:
    artifact = board.make(tmp_path / "made", backend="native-fake")
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
    portable = vlaopt.open(artifact.path, backend="onnxruntime")
    found, expected = (each.predict_chunk(board.observation()) for each in (policy, portable))
    assert np.allclose(found, expected, atol=0.05)
    # another machine has another key
    tell(machine={"gpu": "Other"})
    with pytest.raises(EnvironmentProblem, match="is not built yet"):
        vlaopt.open(artifact.path)


def test_a_machine_of_another_kind_leaves_the_engine_to_the_target(tell: Tell, tmp_path: Path) -> None:
    tell(**ELSEWHERE)
    finish = engine(tmp_path).manifest.finish
    assert finish is not None
    assert finish.reason == "native-fake: board is SM 8.7, the GPU here is 9.0"


def test_native_code_of_another_machine_opens_only_when_it_is_trusted(
    tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = copy(engine(tmp_path), tmp_path / "published")
    assert vlaopt.open(published.path).backend == "native-fake"  # built here: no word needed
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "other"))
    log = tell()
    before = log.read_text()
    with pytest.raises(InputError, match="native code that this machine did not build") as refused:
        vlaopt.open(published.path)
    assert "--trust" in (refused.value.hint or "")
    recipe = board.recipe(tmp_path, "native-fake")
    with pytest.raises(InputError, match="native code that this machine did not build"):
        run_stages(recipe, published, ["verify"], store=Store.default(), progress=Silent())
    assert log.read_text() == before
    assert vlaopt.open(published.path, trust=True).backend == "native-fake"
    assert vlaopt.open(published.path, backend="onnxruntime").backend == "onnxruntime"


@pytest.mark.slow
def test_an_engine_that_does_not_fit_this_machine_is_refused_before_it_is_looked_at(tell: Tell, tmp_path: Path) -> None:
    artifact = board.make(tmp_path / "made", backend="native-fake")
    finished = finish_here(artifact, store=Store.default(), progress=Silent())
    log = tell(**ELSEWHERE)
    before = log.read_text()
    with pytest.raises(EnvironmentProblem, match=r"sm 8\.7 is needed, 9\.0 is here") as refused:
        vlaopt.open(finished.path, trust=True)
    assert f"from the artifact {artifact.id[:12]}" in (refused.value.hint or "")
    assert log.read_text() == before
