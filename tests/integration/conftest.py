"""One small build of the shipped policy, shared by the tests of the chain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlaopt.artifact.store import Store
from vlaopt.chain import Build, build
from vlaopt.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
CPU = ROOT / "recipes/edge-vla/cpu.yaml"
RTX = ROOT / "recipes/edge-vla/x86-rtx.yaml"

SMALL = (
    "calibration.samples=24",
    "export.golden_samples=6",
    "verify.samples=12",
    "bench.duration_s=1",
    "bench.back_to_back_s=0.3",
)
"""Less of everything that takes time, and nothing else."""
NO_RECOVERY = (
    *SMALL,
    "prune.recovery=null",
    "accept.action_error.mean=0.5",
    "accept.gripper_flips=0.2",
    "accept.jerk=0.5",
)
"""Without recovery training the pruned policy is further off: these limits are for tests of the machinery only."""


@dataclass(frozen=True)
class SmallBuild:
    """A build, the store it filled and the folder it was published in."""

    result: Build
    store: Store
    output: Path


@pytest.fixture(scope="session")
def small_build(tmp_path_factory: pytest.TempPathFactory) -> SmallBuild:
    folder = tmp_path_factory.mktemp("chain")
    store = Store(folder / "store")
    recipe = load_recipe(CPU, overrides=NO_RECOVERY)
    return SmallBuild(build(recipe, output=folder / "artifacts", store=store), store, folder / "artifacts")


def vlaopt(*arguments: str | Path, store: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "VLAOPT_STORE": str(store), "COLUMNS": "200"}
    command = [sys.executable, "-m", "vlaopt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False, timeout=900)


def settings(values: Sequence[str]) -> list[str]:
    """The same overrides as command line options."""
    return [argument for value in values for argument in ("--set", value)]
