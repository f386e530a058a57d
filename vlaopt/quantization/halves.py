"""Which nodes compute in FP16 or BF16, and why the others do not. Decides; `casts` writes.

FP16 ends at 65504, so what was seen to come near stays FP32. BF16 has FP32's range and needs no data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from vlaopt.errors import StageError
from vlaopt.graph.external import array, light
from vlaopt.graph.scopes import covers_node
from vlaopt.graph.topology import SEPARATOR, constants, opset_of
from vlaopt.quantization.plan import NodePlan, NodeScheme, Rules

HALVES: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
"""The schemes that are a floating-point type, with ONNX's number of the type."""

FP16_LARGEST = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
HEADROOM = 4.0
"""Observations that calibration never saw reach further: a node stays FP32 when this many times what was seen does not
fit. Two powers of two of the thirty that FP16 has."""

BF16_OPSET = 22
"""The first opset whose convolutions, pooling and recurrent cells take BF16."""

SENSITIVE = frozenset(
    (
        *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
        *("LpNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "CumSum", "ReduceL1", "ReduceL2"),
        *("ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
        *("Cos", "Exp", "Log", "Pow", "Reciprocal", "Sin", "Sqrt"),
    )
)
"""Norms, softmax, sums and time embeddings: cheap, and where halves lose most. They stay FP32 unless a rule names the
operator, such as `vision.*/Softmax`. Recurrent cells do not: TensorRT for RTX 1.7 fails to build an FP32 one that takes
what was FP16 before."""

NO_BF16 = frozenset({"ConvTranspose", "HardSwish", "LpNormalization", "Mish"})
"""TensorRT for RTX 1.7 refuses these in BF16, of sixty operators that were given to it."""

_QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Floats:
    """The float operands of one node that can be half: positions of inputs and of outputs."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def wanted_halves(component: str, model: ModelProto, scheme: NodeScheme, rules: Rules) -> dict[str, NodePlan]:
    """What recipe and operator say that each node with float operands computes in, by node; empty when all is FP32.

    The last rule that says a floating-point type decides, else `scheme`. Rules for int8 and the like do not: they say
    how a layer's operands are stored, and what is left of it has the type of its surroundings.
    """
    kinds = element_types(model)
    found = {}
    for node in model.graph.node:
        if node.op_type not in _QDQ and any(
            kinds.get(name) == TensorProto.FLOAT for name in (*node.input, *node.output)
        ):
            found[node.name] = _wanted(component, node, kinds, opset_of(model), scheme, rules)
    return found if any(plan.scheme in HALVES for plan in found.values()) else {}


def probed_tensors(model: ModelProto, wanted: Mapping[str, NodePlan]) -> list[str]:
    """The tensors whose largest value decides whether a node that is wanted in FP16 can be, in the graph's order."""
    kinds, known, opset = element_types(model), constants(model.graph), opset_of(model)
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.name in wanted and wanted[node.name].scheme == "fp16":
            found |= dict.fromkeys(name for name in operands(node, kinds, opset, "fp16") if name not in known)
    return list(found)


def settled_halves(
    model: ModelProto, wanted: Mapping[str, NodePlan], largest: Mapping[str, float], data: bytes = b""
) -> dict[str, NodePlan]:
    """`wanted` with every node in FP32 that FP16 cannot hold, and the reason.

    `largest` is max |x| of each of `probed_tensors` over the calibration data; infinities, as masks have, do not count.
    `data` is where the weights lie that are not in `model`. Raises StageError when a tensor was not probed.
    """
    kinds, known, opset = element_types(model), constants(model.graph), opset_of(model)
    weights = {name: _extent(array(tensor, data)) for name, tensor in known.items() if _is_float(tensor)}
    result = dict(wanted)
    for node in model.graph.node:
        if node.name not in wanted or wanted[node.name].scheme != "fp16":
            continue
        names = operands(node, kinds, opset, "fp16")
        if lacking := [name for name in names if name not in weights and name not in largest]:
            raise StageError(f"the largest value of {lacking[0]!r} is not known", hint="quantize again")
        reason = next(filter(None, (_too_large(name, weights, largest) for name in names)), None)
        if reason:
            result[node.name] = NodePlan(operator=node.op_type, scheme="fp32", reason=reason)
    return result


def with_halves(nodes: Mapping[str, NodePlan], floats: Mapping[str, NodePlan]) -> dict[str, NodePlan]:
    """The plan of layers with FP16 and BF16 as `floats` settled them, also for what a rule would quantize in vain."""
    result = dict(nodes)
    for name, node in nodes.items():
        settled = floats.get(name)
        if settled and node.scheme in HALVES:
            result[name] = settled
        elif settled and node.scheme == "fp32" and settled.scheme in HALVES:
            result[name] = node.model_copy(update={"scheme": settled.scheme})
    return result


def operands(node: NodeProto, kinds: Mapping[str, int], opset: int, half: str) -> list[str]:
    """The tensors of a node that would be half."""
    floats = half_operands(node, kinds, opset, half)
    return [node.input[at] for at in floats.inputs] + [node.output[at] for at in floats.outputs] if floats else []


def half_operands(node: NodeProto, kinds: Mapping[str, int], opset: int, half: str) -> Floats | None:
    """Which operands of a node become `half`; None when its operator has no such form in `opset`."""
    if node.domain not in ("", "ai.onnx") or any(
        entry.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for entry in node.attribute
    ):
        return None
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    type_name = f"tensor({'float16' if half == 'fp16' else 'bfloat16'})"
    takes = {entry.type_param_str: type_name in entry.allowed_type_strs for entry in schema.type_constraints}
    inputs = [
        (at, _formal(schema.inputs, at).type_str)
        for at, name in enumerate(node.input)
        if kinds.get(name) == TensorProto.FLOAT
    ]
    variables = {kind for _, kind in inputs if kind in takes}
    if not variables or not all(takes[kind] for kind in variables):
        return None
    outputs = [
        at
        for at, name in enumerate(node.output)
        if kinds.get(name) == TensorProto.FLOAT and _formal(schema.outputs, at).type_str in variables
    ]
    return Floats(tuple(at for at, kind in inputs if kind in variables), tuple(outputs)) if outputs else None


def element_types(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor of the graph itself, as ONNX numbers them."""
    inferred = onnx.shape_inference.infer_shapes(light(model)).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    found = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return found | {name: int(tensor.data_type) for name, tensor in constants(model.graph).items()}


def _wanted(
    component: str, node: NodeProto, kinds: Mapping[str, int], opset: int, scheme: NodeScheme, rules: Rules
) -> NodePlan:
    covering = [(glob, said) for glob, said in rules if covers_node(glob, component, node.name)]
    floating = [(glob, said) for glob, said in covering if said in HALVES or said == "fp32"]
    glob, said = floating[-1] if floating else ("", scheme if scheme in HALVES else "fp32")
    reason = f"rule {glob}" if glob else f"scheme {scheme}"
    if said in HALVES:
        opset = max(opset, BF16_OPSET) if said == "bf16" else opset
        if half_operands(node, kinds, opset, said) is None or (said == "bf16" and node.op_type in NO_BF16):
            said, reason = "fp32", f"{node.op_type} has no {said} form"
        elif node.op_type in SENSITIVE and SEPARATOR not in glob:
            said, reason = "fp32", f"{node.op_type} stays FP32 unless a rule names the operator"
    return NodePlan(operator=node.op_type, scheme=said, reason=reason)


def _formal(parameters: Iterable[Any], at: int) -> Any:
    """The schema's entry of an operand; the last one may stand for many."""
    known = list(parameters)
    return known[min(at, len(known) - 1)]


def _is_float(tensor: TensorProto) -> bool:
    return bool(tensor.data_type == TensorProto.FLOAT)


def _extent(values: np.ndarray) -> tuple[float, float]:
    """The largest finite |x| of a constant, and |x| of a single number, else 0."""
    magnitudes = np.abs(values[np.isfinite(values)])
    return float(magnitudes.max(initial=0.0)), float(magnitudes.max(initial=0.0)) if values.size == 1 else 0.0


def _too_large(name: str, weights: Mapping[str, tuple[float, float]], largest: Mapping[str, float]) -> str | None:
    """Why FP16 cannot hold a tensor, or None."""
    if name not in weights:
        seen = largest[name]
        if seen * HEADROOM <= FP16_LARGEST:
            return None
        room = "" if seen > FP16_LARGEST else f", and {HEADROOM:g} times what was seen must fit"
        return f"max |x| of {name!r} is {seen:.5g}: fp16 ends at {FP16_LARGEST:g}{room}"
    most, single = weights[name]
    if most > FP16_LARGEST:
        return f"max |x| of {name!r} is {most:.5g}: fp16 ends at {FP16_LARGEST:g}"
    if 0.0 < single < FP16_SMALLEST_NORMAL:
        return f"{name!r} is {single:.3g}: fp16 is exact from {FP16_SMALLEST_NORMAL:.2g}"
    return None
