"""The wheel under Python 3.10, which JetPack 6 has: what a robot needs is imported, an engine is finished."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT
from tests.integration.test_lanes import Machine, portable
from tests.meta.test_imports import ROBOT_ROOMS, ROBOT_STAGES, modules_of

__all__ = ["portable"]
pytestmark = pytest.mark.slow


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd="/", env={**kept, **environment}
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python 3.10 with vlaopt's wheel and its base dependencies."""
    found = shutil.which("python3.10")
    if found is None or run(found, "--version").returncode:
        pytest.skip("no python3.10 here")
    folder = tmp_path_factory.mktemp("python310")
    made = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    if made.returncode:
        pytest.skip(f"no wheel can be built here: {made.stderr.strip().splitlines()[-1]}")
    assert run(found, "-m", "venv", folder / "venv").returncode == 0
    inside = folder / "venv/bin/python"
    constraints = ("-c", ROOT / "constraints.txt")
    done = run(inside, "-m", "pip", "install", "--quiet", *constraints, next(folder.glob("vlaopt-*.whl")))
    if done.returncode:
        pytest.skip(f"packages cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return inside


def test_every_module_of_a_robot_is_imported(python: Path) -> None:
    names = [*modules_of(ROBOT_ROOMS), *ROBOT_STAGES]
    code = f"import importlib, sys; [importlib.import_module(name) for name in {names!r}]; print(sys.version_info[:2])"
    done = run(python, "-c", code)
    assert (done.returncode, done.stdout) == (0, "(3, 10)\n"), done.stderr


def test_it_finishes_and_verifies_an_engine(python: Path, portable: Callable[..., Path], tmp_path: Path) -> None:
    """On the stand-in for JetPack 6's TensorRT, in an environment that has neither torch nor onnx.

    Plain components ship: the stand-in runs on ONNX Runtime, whose newest for 3.10 has other int8 products.
    """
    jetpack6 = Machine("10.3", tmp_path, python=str(python))
    finished = jetpack6.vlaopt("engine", portable("edge-vla", "engine.minimum_speedup=9")).splitlines()[-1]
    verified = json.loads(jetpack6.vlaopt("verify", finished, "--json"))
    assert (verified["backend"], verified["engine_not_run"]) == ("tensorrt", None)
    assert {gate["held"] for gate in verified["gates"]} == {True}
