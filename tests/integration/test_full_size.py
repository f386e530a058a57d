"""Policies in full size: what the build itself says of its time and memory, and the artifact beside LeRobot."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import vlaopt
from tests.integration.test_lerobot import PARITY, Built, Reference, command
from vlaopt.runtime.loop import draw_noise

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")

RECIPE = """
schema: vlaopt.recipe/1
name: full
version: 1.0.0
target: cpu-x86
policy: {{type: {kind}, checkpoint: {kind}/, hub_overrides: {hub}}}
calibration: {{path: set, samples: 8}}
export: {{golden_samples: 4}}
"""


@pytest.mark.parametrize(
    ("kind", "minutes", "gigabytes"),
    [
        pytest.param("act", 4, 3, marks=pytest.mark.slow),
        pytest.param("smolvla", 15, 8, marks=pytest.mark.full),
    ],
)
def test_it_builds_within_its_time_and_memory_and_acts_as_lerobot_does(
    tmp_path: Path, kind: str, minutes: int, gigabytes: int
) -> None:
    lerobot.make(f"{kind}-full", tmp_path / kind)
    lerobot.write_set(tmp_path / "set", f"{kind}-full", 8)
    hub = "{vlm_model_name: vlm/}" if kind == "smolvla" else "{}"
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(kind=kind, hub=hub))
    done = command("build", tmp_path / "recipe.yaml", "--output", tmp_path / "out", folder=tmp_path, threads=2)
    assert done.returncode == 0, done.stderr
    said = re.search(r"the build took (\d+) s; peak memory ([\d.]+) GiB", done.stderr + done.stdout)
    assert said is not None
    assert int(said[1]) < 60 * minutes
    assert float(said[2]) * 2**30 < gigabytes * 1e9
    path = Path(done.stdout.splitlines()[-1])
    policy, reference = vlaopt.open(path), Reference(Built(kind, tmp_path, path, path))
    observation = lerobot.observations(f"{kind}-full", 1, seed=7)[0]
    noise = draw_noise(policy.spec, np.random.default_rng(0))
    assert np.abs(policy.predict(observation) - reference.select_action(observation, noise)).max() <= PARITY
