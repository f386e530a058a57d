"""A tiny whole policy, its graphs and artifacts, small enough to be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlaopt.artifact.artifact import SPEC_PATH, Artifact, drafted, finish
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import EngineComponent, EngineEntry, Finish, Role, component_path
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    ImageProcessor,
    NormaliseProcessor,
    PolicySpec,
    SingleLoop,
    TensorSpec,
    Unnormalise,
)
from vlaopt.backends import EngineOptions, get
from vlaopt.hashing import canonical_json
from vlaopt.tensors import pack

Files = Mapping[str, tuple[Role, bytes]]
Publish = Callable[..., Artifact]

OFFSETS = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
STATISTICS = {
    "state.mean": np.asarray([1, 2], np.float32),
    "state.std": np.asarray([2, 4], np.float32),
    "action.mean": np.asarray([10, 20], np.float32),
    "action.std": np.asarray([1, 0.5], np.float32),
}


def _graph(name: str, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], weights: Any) -> bytes:
    def values(ports: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(port, TensorProto.FLOAT, shape) for port, shape in ports.items()]

    initializers = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    graph = helper.make_graph(nodes, name, values(inputs), values(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture(scope="session")
def tiny_graphs() -> dict[str, bytes]:
    """`eye`: feature = mean of the image. `arm`: raw = state + feature + OFFSETS, a chunk of three two-dof actions."""
    eye = [helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0)]
    eye += [helper.make_node("Reshape", ["mean", "one"], ["feature"])]
    arm = [helper.make_node("Add", ["state", "feature"], ["seen"])]
    arm += [helper.make_node("Unsqueeze", ["seen", "axis"], ["step"])]
    arm += [helper.make_node("Add", ["step", "offsets"], ["raw"])]
    axes = {"axes": np.asarray([1, 2, 3], np.int64), "one": np.asarray([1, 1], np.int64)}
    weights = {"axis": np.asarray([1], np.int64), "offsets": OFFSETS}
    return {
        "eye": _graph("eye", eye, {"image": [1, 3, 2, 2]}, {"feature": [1, 1]}, axes),
        "arm": _graph("arm", arm, {"state": [1, 2], "feature": [1, 1]}, {"raw": [1, 3, 2]}, weights),
    }


@pytest.fixture(scope="session")
def tiny_spec() -> PolicySpec:
    """The policy of `tiny_graphs`; executes two of the three actions of a chunk."""

    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    feature = tensor("feature", 1, 1)
    return PolicySpec(
        type="tiny",
        action_dim=2,
        gripper=1,
        control_hz=10,
        components={
            "arm": Component(kind="head", inputs=(tensor("state", 1, 2), feature), outputs=(tensor("raw", 1, 3, 2),)),
            "eye": Component(kind="vision", inputs=(tensor("image", 1, 3, 2, 2),), outputs=(feature,)),
        },
        loop=SingleLoop(),
        chunk=Chunk(size=3, n_action_steps=2),
        preprocess=(
            ImageProcessor(input="camera", output="image", height=2, width=2),
            NormaliseProcessor(input="joints", output="state", size=2, statistics="state"),
        ),
        postprocess=Unnormalise(input="raw", statistics="action", low=-100, high=100),
    )


@pytest.fixture
def tiny_observation() -> dict[str, Any]:
    """Joints of three and six and a camera half white: a feature of 0.5 and a normalised state of one and one."""
    camera = np.zeros((2, 2, 3), np.uint8)
    camera[0] = 255
    return {"camera": camera, "joints": np.asarray([3, 6], np.float32)}


@pytest.fixture(scope="session")
def tiny_chunk() -> np.ndarray:
    """What the tiny policy does on `tiny_observation`: (1 + 0.5 + offset) · std + mean."""
    return np.asarray([[11.5, 21.25], [13.5, 22.25], [15.5, 23.25]], np.float32)


@pytest.fixture(scope="session")
def tiny_files(tiny_spec: PolicySpec, tiny_graphs: dict[str, bytes]) -> Files:
    """The files of the tiny policy's artifact, before any engine."""
    return {
        SPEC_PATH: ("policy", canonical_json(tiny_spec.model_dump(mode="json", by_alias=True))),
        "policy/statistics.safetensors": ("policy", pack(STATISTICS)),
        "reports/export.json": ("report", b"{}"),
        **{component_path(name): ("component", graph) for name, graph in tiny_graphs.items()},
    }


def publish_files(
    final: Path,
    files: Files,
    *,
    stage: str = "onnx",
    engine: EngineEntry | None = None,
    unfinished: Finish | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Artifact:
    """An artifact of `files` at `final`."""
    with drafted(final) as draft:
        for path, (role, data) in files.items():
            draft.write(path, data, role)
        draft.engine, draft.finish = engine, unfinished
        fields: dict[str, Any] = {"name": "tiny", "version": "1.0.0", "target": "cpu", "lineage": (), "tools": {}}
        finish(draft, **fields, stage=stage, recipe=dict(recipe or {}))
    return Artifact.open(final)


@pytest.fixture(scope="session")
def publish() -> Publish:
    """Writes an artifact of given files; see `publish_files`."""
    return publish_files


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_files: Files) -> Artifact:
    """The tiny policy with its portable graphs. Shared: not to be changed."""
    return publish_files(tmp_path_factory.mktemp("tiny") / "artifact", tiny_files)


@pytest.fixture(scope="session")
def tiny_engine(tiny_graphs: dict[str, bytes]) -> tuple[EngineEntry, Files]:
    """An engine of the tiny policy for ONNX Runtime, and its files."""
    library, files, components = get("onnxruntime"), {}, {}
    for name, graph in tiny_graphs.items():
        path = f"engines/here/{name}/model.onnx"
        files[path] = ("engine", library.build(Graph(graph), EngineOptions(threads=1)).files["model.onnx"])
        components[name] = EngineComponent(variant="plain", reason="a test", files=(path,), precisions={})
    entry = EngineEntry(
        machine="here",
        backend="onnxruntime",
        backend_version=library.version(),
        threads=1,
        settings={},
        components=components,
    )
    return entry, files
