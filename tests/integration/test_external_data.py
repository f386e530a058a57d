"""A policy whose weights do not fit into its ONNX files goes through the whole chain as one whose weights do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import vlaopt
from tests import toy_flow
from vlaopt import policies
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import build
from vlaopt.graph import external
from vlaopt.recipe.load import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    return made


SAME_FORMS = ("engine.minimum_speedup=0", "engine.backend=onnxruntime")
"""What ships is measured, and two builds of so small a policy may differ in it."""

ALIKE = {"none": 1e-4, "int8": 0.05}
"""Standard deviations. A bias that lies outside is not merged into its product, and not rounded with it."""


def built(folder: Path, scheme: str, limit: int) -> Artifact:
    """The toy policy, built where an ONNX file may hold `limit` bytes of weights."""
    recipe = load_recipe(folder / "recipe.yaml", overrides=[f"quantize.scheme={scheme}", *SAME_FORMS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        patch.setattr(external, "LIMIT", limit)
        patch.setattr(external, "SMALLEST", 128)
        return build(recipe, output=folder / str(limit), store=Store(folder / f"store-{limit}")).artifact


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_the_artifact_of_a_large_policy_does_what_that_of_a_small_one_does(folder: Path, scheme: str) -> None:
    within, outside = built(folder, scheme, external.LIMIT), built(folder, scheme, 256)
    data = [entry.path for entry in outside.manifest.files if entry.path.endswith(".onnx.data")]
    assert "onnx/prefix.onnx.data" in data
    assert all(outside.has(path.removesuffix(".data")) for path in data if path.startswith("onnx/"))
    assert not any(entry.path.endswith(".data") for entry in within.manifest.files)
    for stage in ("quantize", "onnx"):
        assert outside.manifest.metrics[stage].get("layers") == within.manifest.metrics[stage].get("layers")
    for backend in ("onnxruntime", "openvino", "reference"):
        chunks = []
        for artifact in (within, outside):
            policy = vlaopt.open(artifact.path, backend=backend)
            noise = np.random.default_rng(1).standard_normal((1, 8, 3), dtype=np.float32)
            chunks.append(policy.predict_chunk(toy_flow.observation(200), noise) / policy.processors.action_std())
        np.testing.assert_allclose(chunks[0], chunks[1], atol=ALIKE[scheme], err_msg=backend)


def test_a_published_artifact_is_read_by_plain_tools(folder: Path) -> None:
    artifact = built(folder, "none", 256)
    for name in ("vision", "prefix", "step"):
        path = str(artifact.path / "onnx" / f"{name}.onnx")
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
        feeds = {port.name: np.ones(port.shape, dtypes[port.type]) for port in session.get_inputs()}
        assert all(np.isfinite(value).all() for value in session.run(None, feeds))
