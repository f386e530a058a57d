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
from vlaopt.doctor import artifacts, judge
from vlaopt.doctor.artifacts import Wanted
from vlaopt.doctor.probe import probe
from vlaopt.machine import Machine
from vlaopt.target import load_target

MACHINE = Machine(system="Linux", architecture="x86_64", python="3.12.3")


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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for a target of x86 machines on this one")
def test_a_machine_with_tensorrt_11_is_ready_for_x86_gpu(tmp_path: Path) -> None:
    done = doctor("11.4", tmp_path / "log", "--target", "x86-gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ GPU           NVIDIA L4, SM 8.9" in done.stdout
    assert not [call for call in standins.calls(tmp_path / "log") if "deserialize" in call]


def test_a_tensorrt_that_is_too_old_for_the_target_is_told() -> None:
    with standins.installed("10.13", gpu="NVIDIA L4", sm="8.9"):
        verdict = judge(load_target("x86-gpu"), MACHINE, {"tensorrt": probe("tensorrt")})
    assert not verdict.will
    found = check(verdict, "TensorRT")
    assert found.have.startswith("10.13")
    assert (found.holds, found.mend) == (False, "pip install 'tensorrt>=11,<12'")


def test_a_plan_of_this_tensorrt_and_gpu_loads_and_one_of_another_does_not() -> None:
    target = load_target("x86-gpu")
    with standins.installed("11.4", gpu="NVIDIA L4", sm="8.9"):
        here = probe("tensorrt")
    made = manifest(target="x86-gpu", engine=engine(needs=dict(here.machine)))
    assert artifacts.judge(made, target, Wanted(), MACHINE, {"tensorrt": here}).will
    with standins.installed("11.4", gpu="NVIDIA H100", sm="9.0"):
        verdict = artifacts.judge(made, target, Wanted(), MACHINE, {"tensorrt": probe("tensorrt")})
    assert not verdict.will
    found = check(verdict, "engine: gpu")
    assert (found.have, found.need) == ("NVIDIA H100", "NVIDIA L4")
