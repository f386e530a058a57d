"""The shipped recipes of LeRobot's policies, built for every target with tiny checkpoints beside them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, settings
from vlaopt import backends
from vlaopt.artifact.artifact import Artifact

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")


KINDS = ("act", "diffusion", "smolvla")
TARGETS = ("cpu", "x86-rtx", "x86-gpu", "jetson-orin", "jetson-thor")
WIDE = (
    "accept.action_error.mean=2",
    "accept.jerk=5",
    "export.golden_samples=3",
    "bench.duration_s=1",
    "bench.back_to_back_s=0.3",
)
"""Random weights make coarse actions of small rounding errors: these limits only hold the chain together."""
TINY_RULES = """[{scope: "*", scheme: int8}, {scope: "step.*.self_attn", scheme: fp32},
  {scope: "step.*.action_*", scheme: fp32}, {scope: "prefix.*.state_proj", scheme: fp32}]"""
"""Every product of the tiny SmolVLA is too small to pay in 8 bit, so it is asked for, before the recipes' own rules."""


IN_CI = ("smolvla", "x86-rtx")
"""The most there is in one recipe: three components, a loop, and engines for three GPUs. The others take too long."""
EVERY = [(kind, target) for kind in KINDS for target in TARGETS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The recipes of a policy, with what a user puts beside them."""

    @functools.cache
    def folder(kind: str) -> Path:
        place = tmp_path_factory.mktemp("recipes") / kind
        place.mkdir()
        for target in TARGETS:
            shutil.copy(ROOT / f"recipes/{kind}/{target}.yaml", place)
        lerobot.make(kind, place / "checkpoint")
        lerobot.write_set(place / "calibration", kind, 12)
        return place

    return folder


def command(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vlaopt", *map(str, arguments)]
    environment = lerobot.environment(VLAOPT_STORE=str(folder / "store"), COLUMNS="200")
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=900)


@pytest.mark.parametrize(
    ("kind", "target"),
    [pytest.param(*one, marks=pytest.mark.slow if one == IN_CI else pytest.mark.full) for one in EVERY],
)
def test_it_builds(folders: Callable[[str], Path], kind: str, target: str) -> None:
    folder = folders(kind)
    if target == "x86-rtx" and (reason := backends.get("tensorrt-rtx").missing()):
        pytest.skip(reason)
    recipe = folder / f"{target}.yaml"
    assert command("recipe", "validate", recipe, folder=folder).returncode == 0
    values = (*WIDE, f"quantize.rules={TINY_RULES}") if kind == "smolvla" else WIDE
    done = command("build", recipe, "--output", folder / "artifacts", *settings(values), folder=folder)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(Path(done.stdout.splitlines()[-1]))
    for name in artifact.spec().components:
        assert (artifact.path / f"onnx/{name}.onnx").is_file()
    assert artifact.manifest.metrics["onnx"]["quantized_nodes"] > 0
    engine = artifact.manifest.engine
    if target in ("cpu", "x86-rtx"):
        assert engine is not None
        assert set(engine.components) == set(artifact.spec().components)
    else:
        assert artifact.manifest.finish is not None
