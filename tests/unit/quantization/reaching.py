"""A small policy of matrix products in two components, planned in int8, one node of which is given a wrong range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vlaopt.artifact.artifact import SPEC_PATH, Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    NormaliseProcessor,
    PolicySpec,
    SingleLoop,
    TensorSpec,
    Unnormalise,
)
from vlaopt.graph.external import decode
from vlaopt.hashing import canonical_json
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import MinMax
from vlaopt.quantization.collect import collect_ranges
from vlaopt.quantization.plan import QuantizationPlan, calibrated_tensors, component_plan, plan_nodes
from vlaopt.quantization.trials import Trials
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import open_artifact
from vlaopt.target import Target, load_target
from vlaopt.tensors import pack

WIDTH, STATE, CHUNK, ACTIONS = 64, 4, 4, 2
LAYERS = {"body": ["enter/Gemm", "middle.0/Gemm", "middle.1/Gemm"], "arm": ["leave/Gemm"]}
GUILTY = "middle.1/Gemm"
"""Its activation is clipped to a fifth of what it was seen to be."""


@dataclass(frozen=True)
class Reaching:
    """The policy, its plan, and what trials of it take."""

    artifact: Artifact
    graphs: Mapping[str, Graph]
    plan: QuantizationPlan
    golden: Golden
    target: Target

    def trials(self, target: Target | None = None) -> Trials:
        wanted = target or self.target
        return Trials(self.artifact, self.graphs, self.plan, wanted, backend="onnxruntime", golden=self.golden)


def make(folder: Path, publish: Callable[..., Artifact]) -> Reaching:
    """The policy in an artifact of stage `prune` in `folder`."""
    generator = np.random.default_rng(7)
    graphs = {"body": _body(generator), "arm": _arm(generator)}
    statistics = {f"{name}.{kind}": np.full(size, value, np.float32) for name, kind, size, value in _STATISTICS}
    files = {
        SPEC_PATH: ("policy", canonical_json(_spec().model_dump(mode="json", by_alias=True))),
        "policy/statistics.safetensors": ("policy", pack(statistics)),
        **{component_path(name): ("component", graph.model) for name, graph in graphs.items()},
    }
    observations = [{"joints": generator.normal(size=STATE).astype(np.float32)} for _ in range(12)]
    policy = open_artifact(publish(folder / "plain", files), backend="onnxruntime", threads=1)
    golden = Golden(
        tuple(observations), np.stack([policy.predict_chunk(observation) for observation in observations]), None
    )
    inputs = [policy.processors.prepare(observation) for observation in observations]
    written = {path: ("golden", data) for path, data in golden.files(inputs).items()}
    artifact = publish(folder / "artifact", {**files, **written}, stage="prune")
    plan = _plan(graphs, inputs)
    return Reaching(artifact, graphs, plan, Golden.of(artifact), load_target("cpu-x86"))


_STATISTICS = (
    ("state", "mean", STATE, 0.0),
    ("state", "std", STATE, 1.0),
    ("action", "mean", ACTIONS, 0.0),
    ("action", "std", ACTIONS, 1.0),
)


def _plan(graphs: Mapping[str, Graph], inputs: list[Any]) -> QuantizationPlan:
    models = {name: decode(graph) for name, graph in graphs.items()}
    nodes = plan_nodes(models, scheme="int8", rules=[("*", "int8")])
    body = decode(graphs["body"])
    feeds: dict[str, list[Any]] = {"body": [(str(row), dict(given)) for row, given in enumerate(inputs)]}
    evaluator = ReferenceEvaluator(body)
    feeds["arm"] = [(row, {"feature": evaluator.run(None, given)[0]}) for row, given in feeds["body"]]
    components = {}
    for name, model in models.items():
        tensors = calibrated_tensors(model, nodes[name])
        ranges = collect_ranges(graphs[name], lambda name=name: feeds[name], tensors, MinMax(), Silent())
        components[name] = component_plan(graphs[name], nodes[name], ranges)
    guilty = components["body"].ranges
    guilty["second"] = (guilty["second"][0] / 5, guilty["second"][1] / 5)
    return QuantizationPlan(
        scheme="int8",
        calibrator="minmax",
        calibration_digest="0" * 64,
        samples=len(inputs),
        components={**components, "body": components["body"].model_copy(update={"ranges": guilty})},
    )


def _spec() -> PolicySpec:
    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    feature = tensor("feature", 1, WIDTH)
    return PolicySpec(
        type="reaching",
        action_dim=ACTIONS,
        gripper=1,
        control_hz=10,
        components={
            "body": Component(kind="vision", inputs=(tensor("state", 1, STATE),), outputs=(feature,)),
            "arm": Component(kind="head", inputs=(feature,), outputs=(tensor("raw", 1, CHUNK, ACTIONS),)),
        },
        loop=SingleLoop(),
        chunk=Chunk(size=CHUNK, n_action_steps=2),
        preprocess=(NormaliseProcessor(input="joints", output="state", size=STATE, statistics="state"),),
        postprocess=Unnormalise(input="raw", statistics="action"),
    )


def _body(generator: np.random.Generator) -> Graph:
    nodes = [
        helper.make_node("Gemm", ["state", "w0", "b0"], ["entered"], name="enter/Gemm"),
        helper.make_node("Tanh", ["entered"], ["first"], name="enter/Tanh"),
        helper.make_node("Gemm", ["first", "w1", "b1"], ["moved"], name="middle.0/Gemm"),
        helper.make_node("Tanh", ["moved"], ["second"], name="middle.0/Tanh"),
        helper.make_node("Gemm", ["second", "w2", "b2"], ["feature"], name="middle.1/Gemm"),
    ]
    sizes = (STATE, WIDTH, WIDTH, WIDTH)
    weights = {f"w{i}": _normal(generator, sizes[i], sizes[i + 1]) for i in range(3)}
    weights |= {f"b{i}": _normal(generator, 1, sizes[i + 1])[0] for i in range(3)}
    return _graph("body", nodes, {"state": (1, STATE)}, {"feature": (1, WIDTH)}, weights)


def _arm(generator: np.random.Generator) -> Graph:
    nodes = [
        helper.make_node("Gemm", ["feature", "w", "b"], ["flat"], name="leave/Gemm"),
        helper.make_node("Reshape", ["flat", "shape"], ["raw"], name="leave/Reshape"),
    ]
    weights = {
        "w": _normal(generator, WIDTH, CHUNK * ACTIONS),
        "b": _normal(generator, 1, CHUNK * ACTIONS)[0],
        "shape": np.asarray([1, CHUNK, ACTIONS], np.int64),
    }
    return _graph("arm", nodes, {"feature": (1, WIDTH)}, {"raw": (1, CHUNK, ACTIONS)}, weights)


def _normal(generator: np.random.Generator, inputs: int, outputs: int) -> np.ndarray:
    return (generator.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)


def _graph(
    name: str,
    nodes: list[Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
) -> Graph:
    ports = [
        [helper.make_tensor_value_info(port, TensorProto.FLOAT, shape) for port, shape in side.items()]
        for side in (inputs, outputs)
    ]
    body = helper.make_graph(
        nodes, name, *ports, [numpy_helper.from_array(value, key) for key, value in weights.items()]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Graph(model.SerializeToString(deterministic=True))
