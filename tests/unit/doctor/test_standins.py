"""Doctor on TensorRT's stand-ins: what the real backends answer leads to the same verdicts, and no plan is read."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests import standins
from tests.unit.doctor.test_doctor import check, engine, manifest
from vlaopt.doctor import artifacts, probe_all
from vlaopt.doctor.artifacts import Wanted
from vlaopt.machine import read_machine
from vlaopt.target import load_target

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for the target of x86 machines")


def doctor(lane: str, log: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`vlaopt doctor` in a process that finds this lane's stand-ins."""
    variables = standins.environment(lane, gpu="NVIDIA L4", sm="8.9", log=log)
    return subprocess.run(
        [sys.executable, "-m", "vlaopt", "doctor", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_machine_with_tensorrt_11_is_ready_for_x86_gpu(tmp_path: Path) -> None:
    done = doctor("11.4", tmp_path / "log", "--target", "x86-gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ GPU           NVIDIA L4, SM 8.9" in done.stdout
    assert not [call for call in standins.calls(tmp_path / "log") if "deserialize" in call]


def test_a_tensorrt_that_is_too_old_for_the_target_is_told(tmp_path: Path) -> None:
    done = doctor("10.13", tmp_path / "log", "--target", "x86-gpu")
    assert done.returncode == 3
    assert "✗ TensorRT      have  10.13" in done.stdout
    assert "pip install 'tensorrt>=11,<12'" in done.stdout


def test_a_plan_of_this_tensorrt_and_gpu_loads_and_one_of_another_does_not() -> None:
    made = manifest(target="x86-gpu")
    with standins.installed("11.4", gpu="NVIDIA L4", sm="8.9"):
        states, machine = probe_all(["tensorrt"]), read_machine()
        needs = dict(states["tensorrt"].machine)
        here = made.model_copy(update={"engine": engine(needs=needs)})
        target = load_target("x86-gpu")
        assert artifacts.judge(here, target, Wanted(), machine, states).will
    with standins.installed("11.4", gpu="NVIDIA H100", sm="9.0"):
        verdict = artifacts.judge(here, target, Wanted(), machine, probe_all(["tensorrt"]))
        assert not verdict.will
        found = check(verdict, "engine: gpu")
        assert (found.have, found.need) == ("NVIDIA H100", "NVIDIA L4")
