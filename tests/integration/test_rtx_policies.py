"""x86-rtx for every policy: real engines beside the portable graphs, as small as their scheme says, without a GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integration.conftest import RTX, SMALL
from tests.integration.test_rtx import MAGIC
from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stages
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe

SCHEMES = ("none", "fp16", "int8", "mixed", "fp8")

RECIPE = """
schema: vlaopt.recipe/1
name: {kind}
version: 1.0.0
target: x86-rtx
policy: {{type: {type}, checkpoint: checkpoint/, hub_overrides: {hub}}}
calibration: {{path: calibration/, samples: 8}}
export: {{golden_samples: 2}}
quantize: {{scheme: none, calibrator: minmax, evaluations: 8}}
# Random weights make coarse actions of small rounding errors: these limits only hold the chain together.
accept: {{action_error: {{mean: 5}}, jerk: 50}}
"""
VISION = {"hidden_size": 256, "intermediate_size": 1024, "image_size": 256}
TEXT = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Of a SmolVLA that is small, and yet has products that pay in 8 bit."""

pytestmark = [
    pytest.mark.skipif(
        backends.get("tensorrt-rtx").missing() is not None, reason="TensorRT for RTX is not installed here"
    ),
]

Run = Callable[[str, str, str], Artifact]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The chain until the engine is there, for a policy and a scheme; what schemes share is made once."""
    place = tmp_path_factory.mktemp("policies")

    @functools.cache
    def recipe_of(kind: str) -> Path:
        folder = place / kind
        folder.mkdir()
        if kind == "edge-vla":
            return RTX
        lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
        if kind == "smolvla":
            small_smolvla(lerobot, folder)
        else:
            lerobot.make(kind, folder / "checkpoint")
        lerobot.write_set(folder / "calibration", kind, 8)
        hub = "{vlm_model_name: vlm/}" if kind == "smolvla" else "{}"
        (folder / "recipe.yaml").write_text(RECIPE.format(kind=kind, type=kind.removesuffix("-full"), hub=hub))
        return folder / "recipe.yaml"

    def chain(kind: str, scheme: str, target: str) -> Artifact:
        overrides = [f"quantize.scheme={scheme}", "quantize.evaluations=8"]
        if kind == "edge-vla":
            overrides += [*SMALL, "quantize.rules=[]", "accept.action_error.mean=5", "accept.jerk=50"]
        recipe = load_recipe(recipe_of(kind), overrides=overrides, target=target)
        names = ["export", "prune", "quantize", "onnx", "engine"]
        return run_stages(recipe, None, names, store=Store(place / "store"), progress=Silent())[-1].artifact

    return chain


def small_smolvla(lerobot: ModuleType, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for known, sizes in ((lerobot._TINY_VISION, VISION), (lerobot._TINY_TEXT, TEXT)):
            for name, size in sizes.items():
                patch.setitem(known, name, size)
        lerobot.make_smolvla(folder / "checkpoint", folder / "vlm", config={"resize_imgs_with_padding": (256, 256)})


def engine_bytes(artifact: Artifact) -> int:
    return sum(entry.size for entry in artifact.manifest.by_role("engine"))


def is_whole(artifact: Artifact) -> None:
    """An engine of NVIDIA's and a portable graph for every component, all of it checked."""
    artifact.check()
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.backend == "tensorrt-rtx"
    assert set(engine.components) == set(artifact.spec().components)
    for component in engine.components.values():
        assert [artifact.read(path)[:4] for path in component.files] == [MAGIC]
    assert all(artifact.has(component_path(name)) for name in engine.components)


SLOW = [("smolvla", "int8")]
"""The most there is in one policy: three components, a loop, two schemes of engines. The others take too long."""
EVERY = [(kind, scheme) for kind in ("edge-vla", "act", "diffusion", "smolvla", "act-full") for scheme in SCHEMES]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [pytest.param(*one, marks=pytest.mark.slow if one in SLOW else pytest.mark.full) for one in EVERY],
)
def test_a_real_engine_is_built_and_as_small_as_its_scheme_says(run: Run, kind: str, scheme: str) -> None:
    target = "x86-rtx-fp8" if scheme == "fp8" else "x86-rtx"
    artifact, plain = run(kind, scheme, target), run(kind, "none", target)
    is_whole(artifact)
    saved = plain.size("component") - artifact.size("component")
    assert saved >= 0
    if scheme != "none":
        assert engine_bytes(plain) - engine_bytes(artifact) > 0.6 * saved
    if scheme == "mixed":
        report: Any = json.loads(artifact.read("reports/quantize.json"))
        assert report["search"]["times"] == "estimated by multiply-adds"
        assert report["search"]["backend"] == "onnxruntime"
