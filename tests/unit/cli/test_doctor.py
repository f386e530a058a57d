"""vlaopt doctor: text and JSON, exit codes, what it refuses."""

from __future__ import annotations

import platform
from pathlib import Path

from tests.unit.cli.conftest import Cli, write_artifact
from vlaopt import backends


def test_this_machine_is_told_with_its_backends_and_targets(cli: Cli) -> None:
    told = cli("doctor")
    assert told.code == 0, told.err
    assert "architecture" in told.out
    assert "✓ onnxruntime" in told.out
    assert "jetson-orin-nano" in told.out
    assert told.err == ""


def test_as_json_it_is_facts_backends_and_targets(cli: Cli) -> None:
    told = cli("doctor", "--json").json
    assert set(told) == {"machine", "backends", "targets"}
    assert {state["name"] for state in told["backends"]} == set(backends.names())
    assert told["machine"]["python"]
    assert all(isinstance(found["runs"], bool) for found in told["targets"])


def test_a_target_of_another_architecture_ends_with_3(cli: Cli) -> None:
    other = "cpu-arm" if platform.machine() == "x86_64" else "cpu-x86"
    told = cli("doctor", "--target", other)
    assert told.code == 3
    assert "✗ architecture" in told.out
    assert "mend" in told.out


def test_a_verdict_as_json(cli: Cli, artifact: Path) -> None:
    told = cli("doctor", artifact, "--json").json
    assert (told["verdict"]["will"], told["verdict"]["checks"][0]["what"]) == (True, "backend")


def test_an_artifact_without_an_engine_runs_its_portable_graphs(cli: Cli, artifact: Path) -> None:
    told = cli("doctor", artifact)
    assert told.code == 0, told.out + told.err
    assert "its portable graphs run here" in told.out


def test_a_damaged_artifact_is_refused(cli: Cli, tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "damaged")
    path = made.path / "onnx" / "policy.onnx"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    told = cli("doctor", made.path)
    assert told.code == 2
    assert "policy.onnx" in told.err


def test_two_questions_at_once_and_unknown_targets_are_refused(cli: Cli, artifact: Path) -> None:
    both = cli("doctor", artifact, "--target", "cpu-x86")
    assert (both.code, both.out) == (2, "")
    assert "two questions" in both.err
    unknown = cli("doctor", "--target", "jetson-orinn")
    assert unknown.code == 2
    assert "did you mean 'jetson-orin'" in unknown.err
