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
from vlaopt.artifact.manifest import PLAN_PATH
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")


KINDS = ("act", "diffusion", "smolvla")
RECIPES = {kind: sorted(path.stem for path in (ROOT / f"recipes/{kind}").glob("*.yaml")) for kind in KINDS}
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
EVERY = [(kind, name) for kind in KINDS for name in RECIPES[kind]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The recipes of a policy, with what a user puts beside them."""

    @functools.cache
    def folder(kind: str) -> Path:
        place = tmp_path_factory.mktemp("recipes") / kind
        place.mkdir()
        for name in RECIPES[kind]:
            shutil.copy(ROOT / f"recipes/{kind}/{name}.yaml", place)
        lerobot.make(kind, place / "checkpoint")
        lerobot.write_set(place / "calibration", kind, 12)
        return place

    return folder


def command(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vlaopt", *map(str, arguments)]
    environment = lerobot.environment(VLAOPT_STORE=str(folder / "store"), COLUMNS="200")
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=900)


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*one, marks=pytest.mark.slow if one == IN_CI else pytest.mark.full) for one in EVERY],
)
def test_it_builds(folders: Callable[[str], Path], kind: str, name: str) -> None:
    folder = folders(kind)
    if name.startswith("x86-rtx") and (reason := backends.get("tensorrt-rtx").missing()):
        pytest.skip(reason)
    path = folder / f"{name}.yaml"
    assert command("recipe", "validate", path, folder=folder).returncode == 0
    recipe = load_recipe(path)
    rules_of_tiny = kind == "smolvla" and recipe.quantize.scheme == "int8"
    values = (*WIDE, f"quantize.rules={TINY_RULES}") if rules_of_tiny else WIDE
    done = command("build", path, "--output", folder / "artifacts", *settings(values), folder=folder)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(Path(done.stdout.splitlines()[-1]))
    for component in artifact.spec().components:
        assert (artifact.path / f"onnx/{component}.onnx").is_file()
    assert wanted_of(recipe) <= planned_in(artifact)
    engine = artifact.manifest.engine
    if name == "cpu" or name.startswith("x86-rtx"):
        assert engine is not None
        assert set(engine.components) == set(artifact.spec().components)
    else:
        assert artifact.manifest.finish is not None


def wanted_of(recipe: Recipe) -> set[str]:
    """The schemes that a recipe speaks of."""
    return {recipe.quantize.scheme, *(rule.scheme for rule in recipe.quantize.rules)}


def planned_in(artifact: Artifact) -> set[str]:
    """The schemes that layers with weights have in its plan."""
    plan = QuantizationPlan.from_json(artifact.read(PLAN_PATH), where=PLAN_PATH)
    return {node.scheme for component in plan.components.values() for node in component.nodes.values()}
