"""A build that is killed leaves a store from which the next one ends with the same result."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, ROOT, settings
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import plan
from vlaopt.recipe.load import load_recipe

ENDURING = ("export", "prune", "quantize", "onnx")
"""The stages whose result does not depend on what a clock says."""
ARGUMENTS = ["onnx", str(CPU), *settings(NO_RECOVERY)]


def start(store: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "VLAOPT_STORE": str(store)}
    return subprocess.Popen(
        [sys.executable, "-m", "vlaopt", *ARGUMENTS],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def contents(store: Path) -> dict[str, str]:
    """The content digest of every stored stage result; all of them sound."""
    found = {}
    for manifest in store.glob("stages/*/[0-9a-f]*/manifest.json"):
        artifact = Artifact.open(manifest.parent)
        artifact.check()
        found[f"{artifact.manifest.stage}/{manifest.parent.name}"] = artifact.manifest.content_digest()
    return found


def kill_builds(folder: Path, times: int, seed: int) -> None:
    whole = folder / "whole"
    started = time.monotonic()
    assert start(whole).wait() == 0
    seconds = time.monotonic() - started
    wanted = contents(whole)
    assert len(wanted) == len(ENDURING)

    store = folder / "killed"
    moments = random.Random(seed)
    killed = 0
    for attempt in range(4 * times):
        started = time.monotonic()
        process = start(store)
        try:
            process.wait(moments.uniform(0.2, seconds))
            seconds = time.monotonic() - started  # the machine had more to do when the whole build was timed
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        sound = contents(store)
        assert sound.items() <= wanted.items()
        if killed == times:
            break
        if len(sound) == len(wanted):
            store = folder / f"killed-{attempt}"
    assert killed == times, "too many builds were over before they were killed"
    assert start(store).wait() == 0
    assert contents(store) == wanted
    recipe = load_recipe(CPU, overrides=NO_RECOVERY)
    assert [stage.state for stage in plan(recipe, Store(store), ENDURING)] == ["cached"] * len(ENDURING)


def test_killed_twice_then_built(tmp_path: Path) -> None:
    kill_builds(tmp_path, times=2, seed=0)


@pytest.mark.full
def test_killed_at_twenty_random_moments_then_built(tmp_path: Path) -> None:
    kill_builds(tmp_path, times=20, seed=1)


def test_what_a_dead_build_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / "stages" / "export" / f".staging-{dead.pid}-0"
    left.mkdir(parents=True)
    alive = tmp_path / "stages" / "export" / f".staging-{os.getpid()}-0"
    alive.mkdir()
    assert Store(tmp_path).collect(older_than_days=0) == (1, 0)
    assert not left.exists()
    assert alive.exists()
