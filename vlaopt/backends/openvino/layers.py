"""What OpenVINO made of a graph, layer by layer, as its execution graph tells it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlaopt.artifact.graph import Node

_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
_FACTS = ("layerType", "runtimePrecision", "originalLayersNames")
_CODES = ("i8", "u8")
_MOVES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that leave values as they are."""


@dataclass(frozen=True)
class Layer:
    """One layer of an execution graph: OpenVINO's kind, vlaopt's precision, the graph's nodes it was made from.

    `takes` are OpenVINO's precisions of what comes in, constants too.
    """

    kind: str
    precision: str
    origins: tuple[str, ...]
    takes: tuple[str, ...] = ()


def layers_of(compiled: Any) -> list[Layer]:
    """The layers of a compiled model, in its order."""
    found = []
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if key in _FACTS}
        kind, precision, origins = (facts[key] for key in _FACTS)
        takes = tuple(value.get_element_type().get_type_name() for value in node.input_values())
        found.append(Layer(kind, _PRECISIONS.get(precision, precision), tuple(origins.split(",")), takes))
    return found


def fused_products(model: Any, layers: Sequence[Layer]) -> int:
    """How many matrix products of a model lie in layers of fused operators."""
    products = {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "MatMul"}
    return sum(len(products.intersection(layer.origins)) for layer in layers if layer.kind == "Subgraph")


def fused_precisions(nodes: Sequence[Node], layers: Sequence[Layer], apart: Collection[str]) -> dict[str, str]:
    """The precision of the products fused into Subgraph layers, by name, as far as what reaches them shows it.

    `apart` are the nodes that are layers by themselves. A product multiplies 8-bit codes when each side was quantized,
    inside the layer or in front of it; as many 8-bit tensors come in as all such products take; and nothing in the
    layer stems from the node that would make numbers of the codes again: OpenVINO has then put it behind the product.
    Else it computes in the half that it is marked for when nothing comes in as FP32.
    """
    made = {output: node for node in nodes for output in node.outputs if output}
    named = {**made, **{node.name: node for node in nodes}}
    rest = [node for node in nodes if node.operator in ("Gemm", "MatMul") and node.name not in apart]
    fused = {node.outputs[0] for node in rest if not any(_is_constant(name, made) for name in node.inputs)}
    found: dict[str, str] = {}
    for layer in layers:
        told = [name.removesuffix("/WithoutBiases") for name in layer.origins]
        inside = {named[name].name: named[name] for name in told if name in named}
        products = {node.name: node for node in rest if node.name in inside}
        # OpenVINO forgets the name of a product whose transposed operand it took in; what takes it is named.
        products |= {made[name].name: made[name] for node in inside.values() for name in node.inputs if name in fused}
        if layer.kind == "Subgraph":
            found |= dict.fromkeys(_in_codes(products, inside, layer, made), "int8")
            marked = {name: node.computes_in for name, node in products.items() if node.computes_in}
            found |= {} if "f32" in layer.takes else {name: half for name, half in marked.items() if name not in found}
    return found


def _in_codes(
    products: Mapping[str, Node], inside: Mapping[str, Node], layer: Layer, made: Mapping[str, Node]
) -> list[str]:
    """Those that multiply codes; none where fewer 8-bit tensors come in than all of them would take from outside."""
    found, outside = [], set()
    for name, product in products.items():
        sides = [_dequantizer(tensor, made) for tensor in product.inputs[:2]]
        codes = [side.inputs[0] for side in sides if side and side.name not in inside]
        if len(codes) == 2:
            found.append(name)
            outside |= {code for code in codes if code not in made or made[code].name not in inside}
    return found if len(outside) <= sum(precision in _CODES for precision in layer.takes) else []


def _is_constant(tensor: str, made: Mapping[str, Node]) -> bool:
    """Whether a tensor is a weight, dequantized or not; inputs of the graph, which no node makes, count as weights."""
    node = made.get(tensor)
    return node is None or (node.operator == "DequantizeLinear" and node.inputs[0] not in made)


def _dequantizer(tensor: str, made: Mapping[str, Node]) -> Node | None:
    """The DequantizeLinear that a tensor comes from unchanged, or None."""
    node = made.get(tensor)
    while node and node.operator in _MOVES:
        node = made.get(node.inputs[0])
    return node if node and node.operator == "DequantizeLinear" else None
