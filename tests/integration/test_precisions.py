"""Every precision of a GPU goes through the chain: NVIDIA's builder makes its engine, which is as small as it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import ROOT, RTX, SMALL
from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import run_stages
from vlaopt.errors import EnvironmentProblem
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe

WIDE = ("accept.action_error.mean=0.5", "accept.gripper_flips=0.2", "accept.jerk=9")
"""The smallest policy there is loses most by four bits: these limits are for tests of the machinery only."""

pytestmark = [
    pytest.mark.skipif(
        backends.get("tensorrt-rtx").missing() is not None, reason="TensorRT for RTX is not installed here"
    ),
]

Run = Callable[..., Artifact]


def target(folder: Path, name: str, capability: str, *precisions: str) -> str:
    """The file of a class of RTX cards of one generation."""
    described = yaml.safe_load((ROOT / "recipes/targets/x86-rtx.yaml").read_text())
    described |= {"name": name, "compute_capabilities": [capability], "precisions": ["fp32", "fp16", *precisions]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(described))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The chain on one GPU with a scheme, rules and a last stage; export and prune are shared."""
    folder = tmp_path_factory.mktemp("precisions")
    store = Store(folder / "store")
    gpus = {
        "ada": target(folder, "ada", "8.9", "bf16", "int8", "fp8"),
        "blackwell": target(folder, "blackwell", "12.0", "bf16", "int8", "fp8", "nvfp4"),
    }

    def chain(scheme: str, rules: str = "[]", gpu: str = "ada", last: str = "engine") -> Artifact:
        overrides = [*SMALL, *WIDE, f"quantize.scheme={scheme}", f"quantize.rules={rules}"]
        recipe = load_recipe(RTX, overrides=overrides, target=gpus[gpu])
        names = ["export", "prune", "quantize", "onnx", "engine", "verify"]
        stages = names[: names.index(last) + 1]
        return run_stages(recipe, None, stages, store=store, progress=Silent())[-1].artifact

    return chain


def engine_bytes(artifact: Artifact, component: str) -> int:
    return sum(entry.size for entry in artifact.manifest.by_role("engine") if f"/{component}/" in entry.path)


def shrinks(artifact: Artifact, plain: Artifact, component: str) -> bool:
    """Whether the engine of a component lost most of the bytes that its portable graph lost."""
    name = f"onnx/{component}.onnx"
    saved = len(plain.read(name)) - len(artifact.read(name))
    return saved > 100_000 and engine_bytes(plain, component) - engine_bytes(artifact, component) > 0.7 * saved


@pytest.mark.slow
def test_fp16_is_half_the_size_and_verified_with_its_rounding(run: Run) -> None:
    plain, artifact = run("none"), run("fp16", last="verify")
    metrics: dict[str, Any] = artifact.manifest.metrics
    assert metrics["onnx"]["rounded"] == ["language", "vision", "head"]
    assert metrics["onnx"]["bytes"] < 0.51 * metrics["onnx"]["plain_bytes"]
    assert all(set(schemes) == {"fp16"} for schemes in metrics["onnx"]["layers"].values())
    assert shrinks(artifact, plain, "head")
    assert shrinks(artifact, plain, "vision")
    if metrics["verify"]["engine_not_run"]:
        # Unrounded, ONNX Runtime's own FP16 would be as exact as FP32.
        assert 1e-5 < metrics["verify"]["golden"]["executed"]["mean"] < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rules", "gpu", "head"),
    [
        ("bf16", "[]", "ada", {"bf16": 3}),
        ("fp16", '[{scope: "head.*", scheme: int8}]', "ada", {"int8": 3}),
        ("fp8", "[]", "ada", {"fp32": 1, "fp8": 2}),
        ("fp16", '[{scope: "head.*", scheme: fp8}]', "ada", {"fp8": 3}),
        ("int8-weights", "[]", "ada", {"int8-weights": 3}),
        ("int4-weights", "[]", "ada", {"fp32": 1, "int4-weights": 2}),
        ("fp16", '[{scope: "head.*", scheme: int4-weights}]', "ada", {"fp16": 1, "int4-weights": 2}),
        ("nvfp4", "[]", "blackwell", {"fp32": 1, "nvfp4": 2}),
        ("fp16", '[{scope: "head.*", scheme: nvfp4}]', "blackwell", {"fp16": 1, "nvfp4": 2}),
    ],
)
def test_engines_shrink_as_the_scheme_says(run: Run, scheme: str, rules: str, gpu: str, head: dict[str, int]) -> None:
    artifact = run(scheme, rules, gpu)
    assert artifact.manifest.metrics["onnx"]["layers"]["head"] == head
    assert shrinks(artifact, run("none", gpu=gpu), "head")


def test_what_a_gpu_lacks_is_refused_before_anything_runs(run: Run) -> None:
    with pytest.raises(EnvironmentProblem, match=r"nvfp4 needs compute capability 10\.0 or above; ada is SM 8\.9"):
        run("nvfp4")
