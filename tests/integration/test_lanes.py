"""The whole chain on every TensorRT that is met in the field: graphs made on a workstation, finished where it is.

TensorRT and CUDA are the strict stand-ins of `tests/standins`, each lane in processes of its own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import standins
from tests.integration.conftest import ROOT, SMALL, settings
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import EngineEntry

KINDS = ("edge-vla", "act", "smolvla")
DEFAULT = (("edge-vla", "10.3"), ("edge-vla", "11.4"))
"""The oldest lane and the newest."""
SLOW = (("act", "10.13"), ("smolvla", "10.16"))
EVERY = [
    pytest.param(
        kind,
        lane,
        marks=() if (kind, lane) in DEFAULT else pytest.mark.slow if (kind, lane) in SLOW else pytest.mark.full,
    )
    for kind in KINDS
    for lane in standins.LANES
]
TARGET = """
schema: vlaopt.target/1
name: lane
kind: jetson
arch: x86_64
backends: [tensorrt]
compute_capabilities: ["8.7"]
precisions: [fp32, fp16, bf16, int8]
engine_built_on: target
"""
SHORT = ("engine.minimum_speedup=0", "bench.duration_s=1", "bench.back_to_back_s=0.3")
"""The stand-in runs on the CPU, whose times say nothing: what was quantized ships."""
RANDOM = ("accept.action_error.mean=2", "accept.jerk=5", "export.golden_samples=3")
"""Random weights make coarse actions of small rounding errors."""


@dataclass(frozen=True)
class Machine:
    """A machine with one lane of TensorRT: its store, and the log of what was called."""

    lane: str
    folder: Path
    python: str = sys.executable

    def vlaopt(self, *arguments: str | Path) -> str:
        """Run a command in a new process; gives what it says."""
        stand_in = standins.environment(self.lane, log=self.log)
        store = {"VLAOPT_STORE": str(self.folder / "store"), "OMP_WAIT_POLICY": "PASSIVE"}
        done = vlaopt(*arguments, environment={**os.environ, **stand_in, **store}, python=self.python)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def called(self, name: str) -> list[str]:
        """The calls of one function so far."""
        return [call for call in standins.calls(self.log) if call.startswith(f"{name}(")]

    def timing_cache(self) -> Path:
        """The one file of kernels' times that it has."""
        kept = (self.folder / "store/opened/tensorrt").glob("timing-*")
        [path] = (path for path in kept if path.suffix != ".lock")
        return path


def vlaopt(
    *arguments: str | Path, environment: dict[str, str], python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "vlaopt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=900)


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a policy's artifact as a workstation does, which has no TensorRT: the graphs and what finishes them."""

    @functools.cache
    def made(kind: str, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("workstation")
        place = folder / "recipes" / kind
        place.mkdir(parents=True)
        (place / "lane.yaml").write_text(TARGET)
        recipe = (ROOT / f"recipes/{kind}/jetson-orin.yaml").read_text()
        (place / "recipe.yaml").write_text(recipe.replace("target: jetson-orin", "target: ./lane.yaml"))
        environment = {**os.environ, "VLAOPT_STORE": str(folder / "store")}
        if kind == "edge-vla":
            (folder / "calibration").symlink_to(ROOT / "calibration")
            (place / "checkpoint").symlink_to(ROOT / "recipes/edge-vla/checkpoint")
            values = (*SMALL, *SHORT)
        else:
            lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
            lerobot.make(kind, place / "checkpoint")
            lerobot.write_set(place / "calibration", kind, 12)
            environment = lerobot.environment(VLAOPT_STORE=environment["VLAOPT_STORE"])
            values = (*SHORT, *RANDOM)
        done = vlaopt(
            *("engine", place / "recipe.yaml", "--output", folder / "artifacts"),
            *settings((*values, *more)),
            environment=environment,
        )
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.splitlines()[-1])

    return made


@pytest.mark.parametrize(("kind", "lane"), EVERY)
def test_a_policy_is_finished_verified_and_benched(
    portable: Callable[..., Path], tmp_path: Path, kind: str, lane: str
) -> None:
    unfinished = Artifact.open(portable(kind))
    machine = Machine(lane, tmp_path)
    finished = Path(machine.vlaopt("engine", unfinished.path).splitlines()[-1])
    artifact = Artifact.open(finished)
    assert artifact.manifest.parent == unfinished.id
    engine = artifact.manifest.engine
    assert engine is not None
    assert_built_as_planned(engine, artifact, lane)
    built = len(machine.called("Builder.build_serialized_network"))
    assert built >= len(engine.components)
    assert_kernels_are_timed_once(machine)

    assert Path(machine.vlaopt("engine", unfinished.path).splitlines()[-1]) == finished, "it is kept"
    assert len(machine.called("Builder.build_serialized_network")) == built, "nothing is built a second time"

    verified = json.loads(machine.vlaopt("verify", finished, "--json"))
    assert (verified["backend"], verified["engine_not_run"]) == ("tensorrt", None)
    assert {gate["held"] for gate in verified["gates"]} == {True}

    record = json.loads(machine.vlaopt("bench", finished, "--json", "--duration", "1"))["record"]
    assert record["actions"]["checked"] > 0
    assert set(record["told"]) == set(engine.components)
    assert all("CUDA graph" in " ".join(told) for told in record["told"].values()), record["told"]


def assert_built_as_planned(engine: EngineEntry, artifact: Artifact, lane: str) -> None:
    assert engine.backend == "tensorrt"
    audits: dict[str, Any] = artifact.manifest.metrics["engine"]["audit"]
    for name, component in engine.components.items():
        assert component.needs["tensorrt"].startswith(f"{lane}."), name
        assert (component.needs["sm"], component.needs["os"]) == ("8.7", "linux-x86_64")
        assert component.facts["typing"] == "strong"
        assert component.variant == "quantized", component.reason
        assert (artifact.path / component.files[0]).name == "engine.plan"
        assert audits[name]["kept"] == audits[name]["planned"], audits[name]


def assert_kernels_are_timed_once(machine: Machine) -> None:
    """Of the components of one policy, each built in a process of its own."""
    empty, *later = machine.called("IBuilderConfig.create_timing_cache")
    assert empty == "IBuilderConfig.create_timing_cache(<0 bytes>)"
    assert empty not in later, "the next component goes on with what the one before measured"
    assert machine.timing_cache().stat().st_size > 0


@pytest.mark.full
@pytest.mark.parametrize("lane", standins.LANES)
def test_what_kernels_took_is_measured_once(portable: Callable[..., Path], tmp_path: Path, lane: str) -> None:
    unfinished = portable("edge-vla")
    machine = Machine(lane, tmp_path)
    finished = Path(machine.vlaopt("engine", unfinished).splitlines()[-1])
    kept, measured = machine.timing_cache().read_bytes(), kernels_timed(machine)
    assert measured > 0

    shutil.rmtree(finished)
    again = Artifact.open(Path(machine.vlaopt("engine", unfinished).splitlines()[-1]))
    assert machine.timing_cache().read_bytes() == kept
    assert kernels_timed(machine) == measured, "no kernel is timed a second time"
    assert again.manifest.engine is not None
    states = {part.facts["timing_cache"] for part in again.manifest.engine.components.values()}
    assert states == {"reused"}


def kernels_timed(machine: Machine) -> int:
    """How many kernels its builders measured, and did not find in their timing cache."""
    return sum(int(call.removeprefix("timed(").split(",")[0]) for call in machine.called("timed"))
