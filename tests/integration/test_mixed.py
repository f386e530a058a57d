"""A search that is killed goes on where it was, within its budget; its plan is in the artifact, with the reasons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, ROOT, SmallBuild, settings, vlaopt
from vlaopt.artifact.artifact import Artifact
from vlaopt.quantization.plan import QuantizationPlan

MIXED = ROOT / "recipes/edge-vla/cpu-mixed.yaml"
BUDGET = 12
ARGUMENTS = ["quantize", str(MIXED), *settings([*NO_RECOVERY, f"quantize.evaluations={BUDGET}"])]


def killed_after(evaluations: int, store: Path) -> int:
    """Run the search and kill it once so many are in its journal; gives how many were."""
    environment = {**os.environ, "VLAOPT_STORE": str(store)}
    process = subprocess.Popen(
        [sys.executable, "-m", "vlaopt", *ARGUMENTS],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < limit:
        if made(store) >= evaluations:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the search was over before it was killed"
    return made(store)


def made(store: Path) -> int:
    """The evaluations in the journals of a store."""
    lines = [line for path in store.glob("unfinished/quantize/*.jsonl") for line in path.read_bytes().split(b"\n")]
    return sum(b'"choice"' in line and line.endswith(b"}") for line in lines)


@pytest.fixture(scope="module")
def resumed(small_build: SmallBuild, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, int, Path]:
    """The result of a search that was killed, how many evaluations were made by then, and the store."""
    store = tmp_path_factory.mktemp("mixed") / "store"
    shutil.copytree(small_build.store.root, store)
    before = killed_after(3, store)
    with next(store.glob("unfinished/quantize/*.jsonl")).open("ab") as journal:
        journal.write(b'\n{"choice":"00')  # what a kill in the middle of a line leaves
    result = vlaopt(*ARGUMENTS, store=store)
    assert result.returncode == 0, result.stderr
    return Artifact.open(result.stdout.strip()), before, store


def report(artifact: Artifact) -> Any:
    return json.loads(artifact.read("reports/quantize.json"))


def test_the_evaluations_of_a_killed_search_count(resumed: tuple[Artifact, int, Path]) -> None:
    artifact, before, store = resumed
    counted = report(artifact)["search"]["evaluations"]
    assert counted["of_earlier_processes"] == before >= 3
    assert before < counted["made"] <= counted["budget"] == BUDGET
    assert not list(store.glob("unfinished/quantize/*")), "the journal outlived its result"


def test_the_plan_says_why_of_every_layer_and_is_within_the_limits(resumed: tuple[Artifact, int, Path]) -> None:
    artifact, _, _ = resumed
    plan = QuantizationPlan.from_json(artifact.read("policy/quantization.json"), where="the plan")
    assert plan.scheme == "mixed"
    head = plan.components["head"].nodes
    assert all(head[name].reason.startswith("search: ") for name in ("layers.0/Gemm", "layers.2/Gemm"))
    assert {node.reason for node in plan.components["language"].nodes.values()} == {"rule language.*"}
    search = report(artifact)["search"]
    assert search["held"] and search["verdict"]
    assert {"fp32", "uniform", "mixed"} == set(search["times_ms"])
    assert len(search["trials"]) >= search["evaluations"]["made"]


def test_the_same_recipe_again_searches_nothing(resumed: tuple[Artifact, int, Path]) -> None:
    artifact, _, store = resumed
    again = vlaopt(*ARGUMENTS, store=store)
    assert again.stdout.strip() == str(artifact.path)
    assert not list(store.glob("unfinished/quantize/*"))


@pytest.mark.slow
def test_sensitivity_tells_what_parts_cost_and_gain(small_build: SmallBuild, tmp_path: Path) -> None:
    options = [str(CPU), *settings(NO_RECOVERY), "--evaluations", "6"]
    result = vlaopt("sensitivity", *options, "--json", "--plot", tmp_path / "parts.svg", store=small_build.store.root)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["backend"], told["times"]) == ("onnxruntime", "measured")
    parts = {part["group"]: part for part in told["parts"]}
    assert {"vision", "language", "head"} <= set(parts) and len(parts) == 5
    assert parts["vision"]["gain_bytes"] > 1e6
    assert abs(parts["language"]["error"]) < abs(parts["head"]["error"])
    assert "head" in (tmp_path / "parts.svg").read_text()
