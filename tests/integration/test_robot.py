"""The wheel, installed as on a robot: no torch, no onnx; it verifies, benches and runs the artifact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, SmallBuild


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with vlaopt's wheel and its base dependencies only."""
    folder = tmp_path_factory.mktemp("robot")
    wheels = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    if wheels.returncode:
        pytest.skip(f"no wheel can be built here: {wheels.stderr.strip().splitlines()[-1]}")
    venv.create(folder / "venv", with_pip=True)
    wheel = next(folder.glob("vlaopt-*.whl"))
    python = folder / "venv/bin/python"
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    installed = subprocess.run([*command, "openvino"], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"packages cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    return python


def run(python: Path, *arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-m", "vlaopt", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=store,
        env={**environment, "VLAOPT_STORE": str(store)},
    )


def test_torch_and_onnx_are_not_there(robot: Path) -> None:
    found = (
        "import importlib.util as u; print([m for m in ('torch', 'onnx', 'onnxsim', 'onnxscript') if u.find_spec(m)])"
    )
    assert subprocess.run([str(robot), "-c", found], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_it_verifies_the_artifact(robot: Path, small_build: SmallBuild, tmp_path: Path) -> None:
    done = run(robot, "verify", str(small_build.result.artifact.path), "--json", store=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["golden"]["samples"] == 6


def test_it_benches_the_artifact(robot: Path, small_build: SmallBuild, tmp_path: Path) -> None:
    done = run(robot, "bench", str(small_build.result.artifact.path), "--duration", "2", "--json", store=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["record"]
    assert record["actions"]["checked"] > 0
    assert record["paced"]["ticks"] >= 40


def test_it_lists_the_targets_it_was_shipped_with(robot: Path, tmp_path: Path) -> None:
    done = run(robot, "target", "ls", "--json", store=tmp_path)
    assert {target["name"] for target in json.loads(done.stdout)} >= {"cpu-x86", "jetson-orin", "x86-rtx"}


def test_it_says_whether_it_is_ready(robot: Path, small_build: SmallBuild, tmp_path: Path) -> None:
    done = run(robot, "doctor", str(small_build.result.artifact.path), "--json", store=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"]["sentence"] == "its engine loads here"
    assert {"torch", "onnx"}.isdisjoint(told["machine"]["libraries"])
