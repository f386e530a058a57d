"""A machine whose Python has no TensorRT finishes an artifact with trtexec: built, held to the gates, never timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import board, standins
from vlaopt.artifact.artifact import Artifact

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("lane", [standins.LANES[0], standins.LANES[-1]])
def test_trtexec_finishes_what_a_workstation_left(lane: str, tmp_path: Path) -> None:
    made = board.make(tmp_path / "portable", backend="trtexec", stage="bench")
    log = tmp_path / "calls"
    program = {name: value for name, value in standins.environment(lane, log=log).items() if name != "PYTHONPATH"}
    machine = {**os.environ, **program, "VLAOPT_STORE": str(tmp_path / "store"), "OMP_WAIT_POLICY": "PASSIVE"}

    def vlaopt(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vlaopt", *arguments, str(made.path)]
        return subprocess.run(command, env=machine, capture_output=True, text=True, check=False)

    def builds() -> int:
        return sum("--onnx=model.onnx" in call for call in standins.calls(log))

    first = vlaopt("engine")
    assert first.returncode == 0, first.stderr
    built = builds()
    finished = Artifact.open(Path(first.stdout.strip()))
    engine = finished.manifest.engine
    assert engine is not None
    assert (engine.backend, engine.components["arm"].variant) == ("trtexec", "quantized")
    assert dict(engine.components["arm"].precisions) == {"int8": 2}
    assert engine.components["arm"].needs["tensorrt"].startswith(lane)
    report = json.loads(finished.read("reports/engine.json"))
    assert report["action_error"]["executed"]["mean"] < 0.05

    again = vlaopt("engine")
    assert (again.returncode, again.stdout, builds()) == (0, first.stdout, built)
    verified = vlaopt("verify")
    assert verified.returncode == 0, verified.stderr
    assert "verified on trtexec" in verified.stdout
    measured = vlaopt("bench")
    assert measured.returncode == 3
    assert "sessions of trtexec give actions, their time says nothing" in measured.stderr
