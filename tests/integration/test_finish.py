"""The promise: a board finishes an artifact without torch and onnx; each thing that can go wrong there is one error.

The board is a stand-in for TensorRT: see tests/standins.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import board
from tests.standins import calls, environment, installed
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.cli.app import run

WITHOUT = ("torch", "onnx", "onnxscript", "onnxsim")
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
BUILT = "was built already is kept"


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What the workstation made."""
    return board.make(tmp_path_factory.mktemp("board"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store of this test's board. Whatever a test does, nothing half-made is left."""
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "store"))
    made = Store(tmp_path / "store")
    yield made
    assert not list(made.root.glob("**/.staging-*"))


class Board:
    """A machine without torch and onnx; every command is a process of its own."""

    def __init__(self, folder: Path, lane: str = "10.3", **wanted: object) -> None:
        self.folder = folder
        self.log = folder / "calls"
        (folder / "without").mkdir(parents=True)
        (folder / "without/sitecustomize.py").write_text(BLOCK)
        variables = environment(lane, log=self.log, **wanted)  # type: ignore[arg-type]
        paths = [str(folder / "without"), str(board.ROOT), variables["PYTHONPATH"]]
        self.variables = {
            **os.environ,
            **variables,
            "PYTHONPATH": os.pathsep.join(paths),
            "VLAOPT_STORE": str(folder / "store"),
        }

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vlaopt", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.variables, check=False, timeout=300)

    def built(self) -> int:
        """How many engines it has built."""
        return sum("build_serialized_network" in call for call in calls(self.log))


def test_a_board_finishes_an_artifact_once_and_its_sisters_take_it_on_trust(portable: Artifact, tmp_path: Path) -> None:
    orin = Board(tmp_path / "orin")
    first = orin.run("engine", portable.path)
    assert first.returncode == 0, first.stderr
    finished = Artifact.open(first.stdout.strip())
    assert finished.manifest.parent == portable.id
    engine = finished.manifest.engine
    assert engine is not None
    assert engine.machine.startswith("gpu-x86_64-sm87-tensorrt-10.3.")
    arm = engine.components["arm"]
    assert (arm.needs["sm"], arm.needs["gpu"]) == ("8.7", "NVIDIA Orin")
    assert arm.facts["typing"] == "strong"
    assert finished.manifest.metrics["engine"]["audit"]["arm"]["kept"] == 2
    assert orin.built() == 2
    assert list((tmp_path / "orin/store/opened/tensorrt").iterdir())  # timing cache
    # the second time it does nothing, and everything else uses that engine
    assert orin.run("engine", portable.path).stdout == first.stdout
    bench = orin.run("bench", portable.path, "--duration", "1", "--json")
    assert bench.returncode == 0, bench.stderr
    record = json.loads(bench.stdout)["record"]
    assert record["environment"]["gpu"] == "NVIDIA Orin"
    assert record["actions"]["checked"] > 0
    assert json.loads(orin.run("verify", portable.path, "--json").stdout)["backend"] == "tensorrt"
    assert orin.built() == 2

    given = orin.run("engine", portable.path, "--output", tmp_path / "given")
    derived = given.stdout.strip()
    sister = Board(tmp_path / "sister")
    refused = sister.run("verify", derived)
    assert refused.returncode == 2
    assert "native code that this machine did not build" in refused.stderr
    assert "--trust" in refused.stderr
    trusted = sister.run("verify", derived, "--trust", "--json")
    assert trusted.returncode == 0, trusted.stderr
    assert json.loads(trusted.stdout)["backend"] == "tensorrt"

    newer = Board(tmp_path / "newer", "10.13", sm="8.6", gpu="NVIDIA RTX A2000")
    told = newer.run("bench", derived, "--trust")
    assert told.returncode == 3, told.stderr
    for misfit in ("sm 8.7 is needed, 8.6 is here", "gpu NVIDIA Orin is needed, NVIDIA RTX A2000 is here"):
        assert misfit in told.stderr
    assert re.search(r"tensorrt 10\.3\.\S+ is needed, 10\.13\.\S+ is here", told.stderr)
    assert f"from the artifact {portable.id[:12]} that it was made of: vlaopt engine ARTIFACT" in told.stderr
    assert not any("deserialize" in call for call in calls(newer.log))

    arm = Board(tmp_path / "arm")
    with (arm.folder / "without/sitecustomize.py").open("a") as site:
        site.write("import platform\nplatform.machine = lambda: 'aarch64'\n")
    told = arm.run("bench", derived, "--trust")
    assert told.returncode == 3, told.stderr
    assert "os linux-x86_64 is needed, linux-aarch64 is here" in told.stderr
    assert not any("deserialize" in call for call in calls(arm.log))


def test_a_board_whose_python_cannot_load_tensorrt_says_so(portable: Artifact, tmp_path: Path) -> None:
    told = Board(tmp_path / "bare", faults=["no-tensorrt"]).run("engine", portable.path)
    assert told.returncode == 3
    assert "the engine for board cannot be built here: tensorrt: tensorrt cannot be imported: libnvinfer" in told.stderr


@pytest.mark.parametrize(
    ("fault", "code", "problem", "hint"),
    [
        ("build-none", 4, "arm (quantized): TensorRT cannot build the engine: ", None),
        pytest.param(
            "parser-crashes",
            4,
            "arm (quantized): the builder of tensorrt crashed (SIGSEGV)",
            BUILT,
            marks=pytest.mark.slow,
        ),
        ("builder-killed", 4, "arm (quantized): the builder of tensorrt was killed, probably for memory", BUILT),
        pytest.param(
            "builder-segfaults",
            4,
            "arm (quantized): the builder of tensorrt crashed (SIGSEGV)",
            BUILT,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "out-of-memory",
            4,
            "arm (quantized): TensorRT cannot build the engine: ",
            "close other programs",
            marks=pytest.mark.slow,
        ),
        ("ignores-precision", 4, "tensorrt runs 2 of 2 layers of arm in fp32", "engine.allow_shortfall"),
        ("deserialize-none", 4, "TensorRT does not load the engine that it built", None),
        pytest.param(
            "deserialize-segfaults", 4, "the builder of tensorrt crashed (SIGSEGV)", BUILT, marks=pytest.mark.slow
        ),
        pytest.param("execute-fails", 4, "TensorRT refused to run the engine", None, marks=pytest.mark.slow),
        pytest.param(
            "execute-segfaults", 4, "running on tensorrt crashed (SIGSEGV)", "vlaopt doctor", marks=pytest.mark.slow
        ),
        pytest.param("sticky-error", 3, "CUDA error 700", "start it again", marks=pytest.mark.slow),
        ("wrong-actions", 5, "the engine's actions are too far from the reference: mean action error", "diagnose"),
        ("no-driver", 3, "the engine for board cannot be built here: tensorrt: ", "vlaopt doctor"),
        pytest.param(
            "no-gpu",
            3,
            "the engine for board cannot be built here: tensorrt: ",
            "vlaopt doctor",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fault_of_the_board_is_one_error_and_leaves_nothing(
    fault: str,
    code: int,
    problem: str,
    hint: str | None,
    portable: Artifact,
    store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with installed("10.3", faults=[fault]):
        assert run(["engine", str(portable.path), "--json"]) == code
    told = capsys.readouterr()
    assert told.out == ""
    error, *more = told.err.splitlines()
    assert error.startswith("error: ")
    assert problem in error
    assert len(more) <= 1
    if hint is not None:
        assert hint in more[0]
    assert not list(store.root.glob("stages/finished/*"))
    assert not list(store.root.glob("unfinished/**/form.json"))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("strong-refused", marks=pytest.mark.slow),
        "capture-fails",
        pytest.param("instantiate-fails", marks=pytest.mark.slow),
    ],
)
def test_what_has_another_way_is_told_of(
    fault: str, portable: Artifact, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed("10.3", faults=[fault]):
        assert run(["bench", str(portable.path), "--duration", "1"]) == 0
    told = capsys.readouterr().out
    finished = Artifact.open(next(store.root.glob("stages/finished/*")))
    assert finished.manifest.engine is not None
    facts = finished.manifest.engine.components["arm"].facts
    assert facts["typing"] == ("weak" if fault == "strong-refused" else "strong")
    assert ("arm ran as a CUDA graph" in told) == (fault == "strong-refused"), told


@pytest.mark.slow
def test_a_plan_that_does_not_load_any_more_is_refused(
    portable: Artifact, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed("10.3"):
        assert run(["engine", str(portable.path), "--json"]) == 0
    with installed("10.3", faults=["deserialize-none"]):
        assert run(["bench", str(portable.path), "--duration", "1"]) == 3
    assert "TensorRT cannot load the engine" in capsys.readouterr().err


def test_a_machine_of_another_class_says_so(
    portable: Artifact, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed("10.3", sm="8.6", gpu="NVIDIA RTX A2000"):
        assert run(["engine", str(portable.path)]) == 3
    assert "board is SM 8.7, the GPU here is 8.6" in capsys.readouterr().err
