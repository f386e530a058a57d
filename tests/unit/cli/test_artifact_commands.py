"""What a person does with an artifact: look at it, hold it to its gates, measure it, compare it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.cli import conftest
from tests.unit.cli.conftest import CPU, ROOT, Cli, write_artifact


def test_inspect_shows_components_files_and_id(cli: Cli, artifact: Path) -> None:
    told = cli("inspect", artifact)
    assert told.code == 0, told.err
    assert "linear 1.0.0+" in told.out
    assert "state float32[1, 4]" in told.out
    assert "actions float32[1, 3, 2]" in told.out
    assert "onnx/policy.onnx" in told.out
    assert told.err == ""


def test_inspect_says_when_the_control_rate_is_not_known(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = conftest.spec()
    monkeypatch.setattr(conftest, "spec", lambda: known.model_copy(update={"control_hz": None}))
    rates = [cli("inspect", write_artifact(tmp_path / "unknown").path).out]
    monkeypatch.setattr(conftest, "spec", lambda: known)
    rates += [cli("inspect", write_artifact(tmp_path / "known").path).out]
    assert "control rate not known" in rates[0]
    assert f"executed, {known.control_hz:g} Hz" in rates[1]


def test_inspect_as_json_is_the_manifest(cli: Cli, artifact: Path) -> None:
    told = cli("inspect", artifact, "--json")
    assert told.json["manifest"]["name"] == "linear"
    assert len(told.json["id"]) == 64


def test_verify_holds_an_artifact_to_its_own_golden_actions(cli: Cli, artifact: Path) -> None:
    told = cli("verify", artifact)
    assert told.code == 0, told.err
    assert "mean action error" in told.out
    assert "MISSED" not in told.out
    assert told.out.splitlines()[-1].endswith("verified on onnxruntime")


def test_verify_as_json_has_every_gate(cli: Cli, artifact: Path) -> None:
    gates = cli("verify", artifact, "--json").json["gates"]
    assert gates
    assert all(gate["held"] and gate["value"] <= gate["limit"] for gate in gates)


def test_a_missed_gate_is_exit_code_5_and_the_table_still_comes(cli: Cli, tmp_path: Path) -> None:
    told = cli("verify", write_artifact(tmp_path / "off", off_by=1.0).path)
    assert told.code == 5
    assert "MISSED" in told.out
    assert told.err.startswith("error: gates missed: golden: mean action error")
    assert "hint: " in told.err


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_an_option_that_would_do_nothing_is_refused(cli: Cli, artifact: Path, command: str) -> None:
    on_artifact = cli(command, artifact, "--set", "bench.hz=50")
    assert (on_artifact.code, on_artifact.err.count("\n")) == (2, 2)
    assert on_artifact.err.startswith("error: --set: only for a stage")
    on_recipe = cli(command, CPU, "--backend", "openvino")
    assert on_recipe.code == 2
    assert on_recipe.err.startswith("error: --backend: for ")


def test_a_robot_without_torch_and_onnx_verifies_and_measures(artifact: Path, tmp_path: Path) -> None:
    """The same commands in a process where the build's libraries are not there."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "onnxsim", "torch_pruning", "metaworld", "PIL"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from vlaopt.cli.app import run
artifact = {str(artifact)!r}
sys.exit(run(["inspect", artifact]) or run(["verify", artifact]) or run(["bench", artifact, "--duration", "0.2"]))
"""
    environment = {**os.environ, "VLAOPT_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_ends_a_running_command_with_130_and_one_line(
    artifact: Path, tmp_path: Path, number: signal.Signals
) -> None:
    environment = {**os.environ, "VLAOPT_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    # A process started in a shell's background ignores Ctrl-C, and so would its children.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{heed}; from vlaopt.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "bench", str(artifact), "--duration", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        if not maps.is_file():
            process.kill()
            pytest.skip("no /proc: cannot tell when the command is at work")
        deadline = time.monotonic() + 30
        while "onnxruntime" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # past the library's own start
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err
