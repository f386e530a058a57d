"""What is loaded when: nothing heavy for `import vlaopt` and help, and neither torch nor onnx on a robot."""

from __future__ import annotations

import json
import pkgutil
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import vlaopt
from tests.meta.conftest import Run

HEAVY = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "metaworld")
NOT_FOR_HELP = (*HEAVY, "numpy", "yaml", "safetensors", "vlaopt.recipe", "vlaopt.chain", "vlaopt.stages")
ROBOT_LACKS = ("torch", "onnx", "onnxscript", "onnxsim", "torch_pruning", "metaworld", "mujoco", "PIL")

ROBOT_ROOMS = (
    *("errors", "hashing", "files", "optional", "progress", "tensors", "target", "chain", "summary", "report"),
    *("recipe", "artifact", "calibration", "runtime", "backends", "benchmark", "machine", "doctor", "cli", "triton"),
)
"""Rooms of which every module must import without torch and onnx."""
ROBOT_STAGES = ("vlaopt.stages", "vlaopt.stages.engine", "vlaopt.stages.verify", "vlaopt.stages.bench")

BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ROBOT_LACKS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def modules_of(rooms: tuple[str, ...]) -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(vlaopt.__path__, "vlaopt.", onerror=lambda name: None)]
    return [name for name in found if name.split(".")[1] in rooms]


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import vlaopt", NOT_FOR_HELP),
        ("from vlaopt.cli.app import run; run(['--help'])", NOT_FOR_HELP),
        ("from vlaopt.cli.app import run; run(['bench', '--help'])", NOT_FOR_HELP),
        ("from vlaopt.cli.app import run; run(['recipe', 'validate', 'recipes/edge-vla/cpu.yaml'])", HEAVY),
        ("from vlaopt.cli.app import run; run(['target', 'ls'])", HEAVY),
        ("from vlaopt.cli.app import run; run(['cache', 'ls'])", HEAVY),
    ],
    ids=["import", "help", "help of bench", "recipe validate", "target ls", "cache ls"],
)
def test_nothing_heavy_is_loaded(python: Run, code: str, unwanted: tuple[str, ...]) -> None:
    tell = f"\nimport sys, json; print(json.dumps([name for name in {unwanted!r} if name in sys.modules]))"
    done = python("-c", code + tell)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_comes_at_once(root: Path) -> None:
    """The best of several runs, in seconds of CPU, so that a busy machine does not count as a slow program."""
    best = float("inf")
    for _ in range(15):
        started = cpu_seconds_of_children()
        subprocess.run([sys.executable, "-m", "vlaopt", "--help"], check=True, capture_output=True, cwd=root)
        best = min(best, cpu_seconds_of_children() - started)
        if best < 0.3:
            break
    assert best < 0.3


def test_the_lower_floors_and_the_commands_of_a_robot_import_without_torch_and_onnx(python: Run) -> None:
    names = [*modules_of(ROBOT_ROOMS), *ROBOT_STAGES]
    assert {"vlaopt.cli.bench", "vlaopt.cli.verify", "vlaopt.cli.inspect", "vlaopt.runtime.policy"} <= set(names)
    code = f"""{BLOCK}
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("target", "show", "jetson-orin"),
        ("recipe", "show", "recipes/edge-vla/jetson-orin.yaml"),
        ("cache", "ls"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_work_without_torch_and_onnx(python: Run, arguments: tuple[str, ...]) -> None:
    done = python("-c", f"{BLOCK}\nfrom vlaopt.cli.app import run; sys.exit(run({list(arguments)!r}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_command_that_needs_torch_says_which_extra_brings_it(python: Run) -> None:
    done = python(
        "-c", f"{BLOCK}\nfrom vlaopt.cli.app import run; sys.exit(run(['export', 'recipes/edge-vla/cpu.yaml']))"
    )
    assert done.returncode == 3, done.stderr
    assert "torch" in done.stderr
    assert "vlaopt[build]" in done.stderr
    assert "Traceback" not in done.stderr
