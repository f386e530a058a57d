"""A tiny int8 policy for a board with a GPU, ready to be finished there: made by hand, without torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from vlaopt.artifact.artifact import SPEC_PATH, Artifact, drafted, finish
from vlaopt.artifact.manifest import PLAN_PATH, Finish, component_path, plain_path
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    NormaliseProcessor,
    PolicySpec,
    SingleLoop,
    TensorSpec,
    Unnormalise,
)
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import Golden
from vlaopt.tensors import pack

ROOT = Path(__file__).parents[1]
JOINTS, WIDE, CHUNK, ACTIONS = 16, 64, 4, 3
TARGET = """
schema: vlaopt.target/1
name: board
kind: gpu
arch: {arch}
backends: [{backend}]
compute_capabilities: ["8.7"]
precisions: [fp32, fp16, int8]
engine_built_on: target
"""
OVERRIDES = (
    *("engine.backend=auto", "engine.minimum_speedup=0", "verify.observations=null", "accept.jerk=1"),
    *("quantize.scheme=int8", "quantize.rules=[]", "bench.back_to_back_s=0.2"),
)
STATISTICS = {
    "state.mean": np.zeros(JOINTS, np.float32),
    "state.std": np.ones(JOINTS, np.float32),
    "action.mean": np.zeros(ACTIONS, np.float32),
    "action.std": np.ones(ACTIONS, np.float32),
}


def recipe(folder: Path, backend: str, *overrides: str) -> Recipe:
    """A recipe for the board, whose target's file is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "board.yaml").write_text(TARGET.format(arch=platform.machine(), backend=backend))
    return load_recipe(
        ROOT / "recipes/edge-vla/jetson-orin.yaml",
        target=str(folder / "board.yaml"),
        overrides=[*OVERRIDES, *overrides],
    )


def make(folder: Path, *overrides: str, backend: str = "tensorrt", stage: str = "bench") -> Artifact:
    """The artifact as a workstation leaves it, or as stage `onnx` does; component `arm` is two products in int8."""
    whole = recipe(folder, backend, *overrides).resolved()
    weights = _weights()
    with drafted(folder / "artifact") as draft:
        draft.write_json(SPEC_PATH, spec(), "policy")
        draft.write("policy/statistics.safetensors", pack(STATISTICS), "policy")
        draft.write(component_path("arm"), _graph(weights, quantized=True), "component")
        draft.write(plain_path("arm"), _graph(weights, quantized=False), "plain")
        nodes = {
            name: {"operator": "MatMul", "scheme": "int8", "reason": "by hand"}
            for name in ("wide/MatMul", "out/MatMul")
        }
        draft.write_json(PLAN_PATH, {"components": {"arm": {"nodes": nodes}}}, "policy")
        for path, data in _golden(weights).items():
            draft.write(path, data, "golden")
        if stage == "bench":
            draft.finish = Finish(backend=backend, command="vlaopt engine ARTIFACT", reason="there is no GPU here")
        finish(
            draft,
            name="tiny",
            version="1.0.0",
            target="board",
            stage=stage,
            recipe={key: whole[key] for key in whole if key not in ("name", "version", "schema")},
            lineage=(),
            tools={},
        )
    return Artifact.open(folder / "artifact")


def spec() -> PolicySpec:
    """Joints to a chunk of actions."""
    state = TensorSpec(name="state", dtype="float32", shape=(1, JOINTS))
    raw = TensorSpec(name="raw", dtype="float32", shape=(1, CHUNK, ACTIONS))
    return PolicySpec(
        type="tiny",
        action_dim=ACTIONS,
        control_hz=20,
        components={"arm": Component(kind="single", inputs=(state,), outputs=(raw,))},
        loop=SingleLoop(),
        chunk=Chunk(size=CHUNK, n_action_steps=CHUNK),
        preprocess=(NormaliseProcessor(input="joints", output="state", size=JOINTS, statistics="state"),),
        postprocess=Unnormalise(input="raw", statistics="action"),
    )


def observation(index: int = 0) -> dict[str, Any]:
    """Random joints, equal for an equal index."""
    return {"joints": np.random.default_rng(index).uniform(-1, 1, JOINTS).astype(np.float32)}


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "wide": random.normal(0, JOINTS**-0.5, (JOINTS, WIDE)).astype(np.float32),
        "out": random.normal(0, WIDE**-0.5, (WIDE, CHUNK * ACTIONS)).astype(np.float32),
    }


def _golden(weights: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    observations = tuple(observation(index) for index in range(4))
    hidden = [np.maximum(row["joints"] @ weights["wide"], 0) for row in observations]
    actions = np.stack([(row @ weights["out"]).reshape(CHUNK, ACTIONS) for row in hidden]).astype(np.float32)
    return Golden(observations, actions, None).files([{"state": row["joints"][None]} for row in observations])


def _graph(weights: Mapping[str, np.ndarray], *, quantized: bool) -> bytes:
    """Two products with a ReLU between; their inputs and weights through symmetric int8 where quantized."""
    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {"shape": np.asarray([1, CHUNK, ACTIONS], np.int64)}

    def product(name: str, given: str, largest: float) -> str:
        weight = weights[name]
        if not quantized:
            constants[f"{name}.weight"] = weight
            operands = [given, f"{name}.weight"]
        else:
            scale = (np.abs(weight).max(0) / 127).astype(np.float32)
            constants[f"{name}.int8"] = np.round(weight / scale).astype(np.int8)
            constants[f"{name}.scale"], constants[f"{name}.zero"] = scale, np.zeros(weight.shape[1], np.int8)
            constants[f"{name}.in.scale"], constants[f"{name}.in.zero"] = np.float32(largest / 127), np.int8(0)
            taken = [f"{name}.in.scale", f"{name}.in.zero"]
            operands = [f"{name}.in", f"{name}.weight"]
            nodes.extend(
                [
                    helper.make_node("QuantizeLinear", [given, *taken], [f"{name}.q"], f"{name}/QuantizeLinear"),
                    helper.make_node(
                        "DequantizeLinear", [f"{name}.q", *taken], operands[:1], f"{name}/DequantizeLinear"
                    ),
                    helper.make_node(
                        "DequantizeLinear",
                        [f"{name}.int8", f"{name}.scale", f"{name}.zero"],
                        operands[1:],
                        f"{name}/weight/DequantizeLinear",
                        axis=1,
                    ),
                ]
            )
        nodes.append(helper.make_node("MatMul", operands, [f"{name}.product"], f"{name}/MatMul"))
        return f"{name}.product"

    nodes.append(helper.make_node("Relu", [product("wide", "state", 1.0)], ["hidden"], "Relu"))
    nodes.append(helper.make_node("Reshape", [product("out", "hidden", 2.0), "shape"], ["raw"], "Reshape"))
    graph = helper.make_graph(
        nodes,
        "arm",
        [helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, JOINTS])],
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, [1, CHUNK, ACTIONS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return data
