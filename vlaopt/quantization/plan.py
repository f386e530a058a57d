"""The quantization plan: which node runs in which precision and why, and the ranges of its activations. As data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import pydantic
from onnx import ModelProto
from pydantic import BaseModel, ConfigDict, Field

from vlaopt.artifact.graph import Graph
from vlaopt.errors import InputError
from vlaopt.graph.scopes import covers_node, node_path
from vlaopt.hashing import canonical_json
from vlaopt.quantization.calibrators import CalibratorName, Range, Steps
from vlaopt.quantization.weights import BLOCKS, Layer, block_of, layers, quantized_outputs, residuals
from vlaopt.scopes import nearest

NodeScheme = Literal["int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8", "nvfp4", "fp16", "bf16", "fp32"]
PlanScheme = Literal["int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8", "nvfp4", "fp16", "bf16", "mixed"]
FP8_TAPS = 32
"""Taps of the largest filter that TensorRT convolves in FP8: of 5 × 5 and 7 × 7, RTX 1.7 builds the one in FP8, the
other in FP32 without a word. NVIDIA's Model Optimizer leaves filters of more than 32 alone too."""
COMPUTED = frozenset({"int8", "int8-dynamic", "fp8"})
"""The schemes that quantize activations, which costs something: they must pay for it."""
WeightScales = Literal["per-channel", "per-tensor"]
Rules = Sequence[tuple[str, NodeScheme]]
"""Pairs of glob and scheme; of all that cover a node the last decides."""

PAYS_FROM: Mapping[str, float] = {"Conv": 32.0, "Gemm": 96.0, "MatMul": 96.0}
"""Multiply-adds per value read or written from which 8-bit beats FP32 on a CPU.

Below, quantizing the values costs more than the products save. Measured with ONNX Runtime 1.31 and OpenVINO 2026.4 on
one thread of a Xeon with AMX on chains of one layer: pointwise convolutions of 32, 64 and 256 channels (intensity 16,
32, 128) ran 0.94, 1.19 and 1.67 times as fast as FP32, depthwise ones 0.3 times, products of 128, 256 and 1024 squared
(intensity 64, 128, 512) 0.9, 1.7 and 2.9 times.
"""
ATTENTION_PAYS_FROM = 32.0
"""The same for a product of two activations: with the attention of LeRobot's ACT (intensity 45) in int8 the quantized
policy took 0.97 of its time in ONNX Runtime and in OpenVINO, on a CPU with AVX2 (medians; its noise was as large).
"""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NodePlan(_Frozen):
    """What one node with weights runs in, and why."""

    operator: str
    scheme: NodeScheme
    reason: str


class ComponentPlan(_Frozen):
    """The nodes with weights of one component, by name, and the ranges of their activations: [low, high] by tensor."""

    graph_digest: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the graph that was planned for.")
    nodes: dict[str, NodePlan]
    ranges: dict[str, tuple[float, float]] = {}
    means: dict[str, tuple[float, ...]] = Field(
        default={}, description="Mean of every channel of the layers' activations. Empty: biases are not corrected."
    )
    smoothing: dict[str, tuple[float, ...]] = Field(
        default={}, description="What channels of activations were divided by before ranges were taken, by tensor."
    )
    floats: dict[str, NodePlan] = Field(
        default={},
        description="What every node computes in where nothing is quantized: fp16, bf16 or fp32. Empty: all FP32.",
    )

    def named(self, scheme: NodeScheme) -> list[str]:
        """The nodes of a scheme."""
        return [name for name, node in self.nodes.items() if node.scheme == scheme]

    def half_nodes(self) -> dict[str, NodePlan]:
        """The nodes that compute in FP16 or BF16 around what is quantized; what `nodes` has in FP32 does not."""
        return {
            name: node
            for name, node in self.floats.items()
            if node.scheme != "fp32" and (name not in self.nodes or self.nodes[name].scheme != "fp32")
        }

    def counts(self) -> dict[str, int]:
        """How many nodes with weights each scheme has."""
        return dict(sorted(Counter(node.scheme for node in self.nodes.values()).items()))

    def changed(self) -> list[str]:
        """The nodes that are not all FP32."""
        return [*(name for name, node in self.nodes.items() if node.scheme != "fp32"), *self.half_nodes()]


class QuantizationPlan(_Frozen):
    """The plan of a whole policy. One plan serves every backend; how Q/DQ nodes are placed differs per backend."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    schema_: Literal["vlaopt.quantization/1"] = Field(default="vlaopt.quantization/1", alias="schema")
    scheme: PlanScheme
    weights: WeightScales = "per-channel"
    calibrator: CalibratorName | None = Field(description="null when nothing was calibrated.")
    steps: Steps = Field(default="together", description="How loop steps made one range.")
    calibration_digest: str | None
    samples: int = Field(ge=0)
    components: dict[str, ComponentPlan]

    def to_json(self) -> bytes:
        """Canonical JSON: equal plans give equal bytes."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    def must_change_something(self, *, where: str) -> None:
        """Raise InputError, with examples of why, when every layer stays in FP32: nobody asks for that by a scheme.

        A search (`mixed`) may find that it is best.
        """
        if self.scheme == "mixed" or any(component.changed() for component in self.components.values()):
            return
        nodes = [
            (node_path(name, node), planned.reason)
            for name, component in self.components.items()
            for node, planned in component.nodes.items()
        ]
        examples = "; ".join(f"{path}: {reason}" for path, reason in nodes[:2])
        raise InputError(
            f"scheme {self.scheme} changes nothing, all {len(nodes)} layers stay in FP32 ({examples})",
            where=where,
            hint="ask for layers by quantize.rules, or write scheme: none",
        )

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> QuantizationPlan:
        """The plan in `data`. Raises InputError with the first problem, placed at `where` and its key."""
        try:
            return cls.model_validate_json(data)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise InputError(f"not a quantization plan: {problem['msg']}", where=f"{where}:{key}") from error


def plan_nodes(
    models: Mapping[str, ModelProto], *, scheme: NodeScheme, rules: Rules = (), floats: NodeScheme = "fp32"
) -> dict[str, dict[str, NodePlan]]:
    """What every node with weights of every component runs in, by component and node.

    Without a rule, `scheme` holds for the nodes it pays for (`PAYS_FROM`), and for convolutions that take what another
    int8 node takes: the tensor would be kept in both forms, 0.35 of 20 ms of ACT, measured with OpenVINO. A rule holds
    as it says, except that weights of lookups and recurrent cells are stored in int8 where it says int8, and a node
    without such a form stays FP32. `floats` is what the rest computes in: which nodes can, `halves` says; rules may
    then speak of all nodes. Raises InputError for a rule that covers no node that can do what it says.
    """
    found = {component: layers(model) for component, model in models.items()}
    said = {scheme, floats, *(wanted for _, wanted in rules)}
    for glob, wanted in rules:
        # Where something is half, rules for floats hold for every node, as of `vision.*/Softmax`.
        of_any = wanted in ("fp16", "bf16") or (wanted == "fp32" and said & {"fp16", "bf16"})
        if not of_any or not _covers_any(glob, models):
            _must_apply(glob, wanted, found)
    return {component: _of_component(component, known, scheme, rules) for component, known in found.items()}


def calibrated_tensors(model: ModelProto, nodes: Mapping[str, NodePlan]) -> list[str]:
    """The activations of `model` that some placement of these nodes needs the range of, in the graph's order."""
    chosen = [name for name, node in nodes.items() if node.scheme == "int8"]
    known = layers(model)
    in_codes = (*chosen, *(name for name, node in nodes.items() if node.scheme == "fp8"))
    taken = {tensor for name in in_codes for tensor in known[name].activations}
    convolved = {known[name].node.output[0] for name in chosen if known[name].node.op_type == "Conv"}
    skips = set(residuals(model.graph, chosen).values()) & convolved
    tensors = taken | skips | quantized_outputs(model.graph, chosen)
    order = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [name for name in order if name in tensors]


def corrected_tensors(model: ModelProto, nodes: Mapping[str, NodePlan]) -> dict[str, int]:
    """The activations whose means correct the biases of these nodes, with the axis along which their channels lie."""
    found: dict[str, int] = {}
    for name, layer in layers(model).items():
        if nodes[name].scheme == "int8" and layer.weights and layer.activation:
            found.setdefault(layer.activation, layer.channel_axis)
    return found


def component_plan(
    graph: Graph,
    nodes: Mapping[str, NodePlan],
    ranges: Mapping[str, Range],
    floats: Mapping[str, NodePlan] = MappingProxyType({}),
    means: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    smoothing: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> ComponentPlan:
    """The plan of one component from its parts. `graph` is the one that it was made for."""
    return ComponentPlan(
        graph_digest=graph.digest,
        nodes=dict(nodes),
        ranges={name: (found.low, found.high) for name, found in ranges.items()},
        floats=dict(floats),
        means=dict(means),
        smoothing=dict(smoothing),
    )


def _of_component(component: str, known: Mapping[str, Layer], scheme: NodeScheme, rules: Rules) -> dict[str, NodePlan]:
    alone = {name: _node_plan(component, layer, scheme, rules, frozenset()) for name, layer in known.items()}
    in_codes = {tensor for name, node in alone.items() if node.scheme == "int8" for tensor in known[name].activations}
    return {name: _node_plan(component, layer, scheme, rules, in_codes) for name, layer in known.items()}


def _node_plan(component: str, layer: Layer, scheme: NodeScheme, rules: Rules, in_codes: Collection[str]) -> NodePlan:
    name, operator = layer.node.name, layer.node.op_type
    decisive = next((rule for rule in reversed(rules) if covers_node(rule[0], component, name)), None)
    if decisive is None:
        chosen, reason = _by_default(layer, scheme, in_codes)
    else:
        chosen, reason = _by_rule(layer, *decisive)
    return NodePlan(operator=operator, scheme=chosen, reason=reason)


def _by_default(layer: Layer, scheme: NodeScheme, in_codes: Collection[str]) -> tuple[NodeScheme, str]:
    possible, obstacle = _possible(layer, scheme)
    if possible != scheme:
        return "fp32", obstacle
    if scheme not in COMPUTED:
        return scheme, f"scheme {scheme}"
    least = ATTENTION_PAYS_FROM if layer.other else PAYS_FROM[layer.node.op_type]
    if layer.intensity < least:
        if scheme == "int8" and layer.node.op_type == "Conv" and layer.activation in in_codes:
            return scheme, "another int8 layer takes what it takes"
        return "fp32", f"{layer.intensity:.0f} multiply-adds per value: too few, 8-bit pays from {least:.0f}"
    return scheme, f"{layer.intensity:.0f} multiply-adds per value"


def _by_rule(layer: Layer, glob: str, wanted: NodeScheme) -> tuple[NodeScheme, str]:
    possible, obstacle = _possible(layer, wanted)
    reason = f"rule {glob}"
    return possible, reason if possible == wanted else f"{reason} says {wanted}, but {obstacle}"


def _possible(layer: Layer, wanted: NodeScheme) -> tuple[NodeScheme, str]:
    """The nearest to `wanted` that the node can run in, and why it is another."""
    if layer.other and wanted not in ("fp32", "int8", "fp16", "bf16"):
        return "fp32", "it multiplies two activations, for which no low precision but int8 is placed"
    if wanted in ("fp32", "fp16", "bf16", "int8-weights"):
        return wanted, ""
    if wanted in BLOCKS:
        least = BLOCKS[wanted][-1]
        obstacle = "" if block_of(layer, wanted) else f"only products with a multiple of {least} inputs have {wanted}"
        return "fp32" if obstacle else wanted, obstacle
    if layer.activation is None:
        # Dequantized on every run they made an LSTM 1.36 times as slow in ONNX Runtime, so nobody gets it unasked.
        fallback: NodeScheme = "int8-weights" if wanted == "int8" else "fp32"
        return fallback, f"only the weights of {layer.node.op_type} can be int8, which saves storage and no time"
    if layer.obstacle:
        return "fp32", layer.obstacle
    if wanted == "fp8" and layer.node.op_type == "Conv" and (taps := math.prod(layer.weights[0].shape[2:])) > FP8_TAPS:
        return "fp32", f"TensorRT has FP8 kernels for filters of up to {FP8_TAPS} taps, and this one has {taps}"
    if wanted == "int8-dynamic" and layer.node.op_type == "Conv":
        return "fp32", "only matrix products have a dynamic form that backends fuse"
    return wanted, ""


def _covers_any(glob: str, models: Mapping[str, ModelProto]) -> bool:
    return any(covers_node(glob, component, node.name) for component in models for node in models[component].graph.node)


def _must_apply(glob: str, wanted: NodeScheme, found: Mapping[str, Mapping[str, Layer]]) -> None:
    every = [(component, layer) for component, known in found.items() for layer in known.values()]
    covered = [layer for component, layer in every if covers_node(glob, component, layer.node.name)]
    if not covered:
        near = nearest(glob, (node_path(component, layer.node.name) for component, layer in every))
        raise InputError(
            f"scope {glob!r} matches no layer with weights",
            where="quantize.rules",
            hint=f"the nearest layer is {near!r}" if near else "this policy has no layer with weights",
        )
    reasons = [_possible(layer, wanted) for layer in covered]
    if wanted != "fp32" and all(possible == "fp32" for possible, _ in reasons):
        raise InputError(
            f"nothing that scope {glob!r} matches can be {wanted}: {reasons[0][1]}", where="quantize.rules"
        )
