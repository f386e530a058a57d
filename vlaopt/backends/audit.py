"""The audit: which precision each layer of a graph really runs in, by name, and what of a plan an engine does not keep.

Backends name their kernels after nodes, with endings of their own, or after the last of several that they fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlaopt.artifact.graph import Node

MATRIX_OPERATORS = frozenset(
    ("Conv", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "MatMulInteger", "RNN")
)
UNKNOWN = "unknown"
"""The precision of a layer of which the backend does not tell it."""

_COMPUTED = {
    "int8": "int8",
    "int8-dynamic": "int8",
    "fp8": "fp8",
    "fp16": "fp16",
    "bf16": "bf16",
}
"""The precision that products compute in, by the scheme that they are planned in; other schemes only store."""
_HALVES = frozenset(("fp16", "bf16"))
_NAMED = 6
"""Layers that a message names; the report has them all."""


@dataclass(frozen=True)
class Audit:
    """What a plan says of the matrix layers of a component, held against what runs; both by node name.

    `planned` are those that were planned to compute in low precision, or in FP32 among others in halves; `others` those
    of them that run in another precision, `UNKNOWN` where the backend shows them nowhere.
    """

    planned: Mapping[str, str]
    others: Mapping[str, str]

    def told(self, backend: str, component: str) -> str:
        """One line: `openvino runs 3 of 24 layers of vision in fp32 that were planned in int8: vision.project, …`."""
        kinds = sorted({f"{kind} precision" if kind == UNKNOWN else kind for kind in self.others.values()})
        wanted = sorted({self.planned[node] for node in self.others})
        names = list(dict.fromkeys(layer_path(component, node) for node in self.others))
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return (
            f"{backend} runs {len(self.others)} of {len(self.planned)} layers of {component} in {' or '.join(kinds)} "
            f"that were planned in {' or '.join(wanted)}: {', '.join(names[:_NAMED])}{rest}"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, the layers that keep to the plan counted."""
        return {"planned": len(self.planned), "kept": len(self.planned) - len(self.others), "others": {**self.others}}


def audit(planned: Mapping[str, str], layers: Mapping[str, str], counts: Mapping[str, int]) -> Audit:
    """The audit of a component by `layers` (node name → precision) and `counts` (precision → layers) of its engine.

    A layer that the backend does not name is as planned while `counts` holds more of its precision than are named: a
    backend that only counts is held to its counts.
    """
    spare = Counter(counts)
    spare.subtract(Counter(layers.values()))
    others: dict[str, str] = {}
    for node, wanted in planned.items():
        found = layers.get(node, UNKNOWN)
        if wanted == "fp32":
            others |= {node: found} if found in _HALVES else {}
        elif found == UNKNOWN and spare[wanted] > 0:
            spare[wanted] -= 1
        elif found != wanted:
            others[node] = found
    return Audit(planned, others)


def planned_precisions(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The precision of every matrix node that a plan, as JSON, lets compute in a lower one.

    Of a plan with halves that of its FP32 nodes too: a backend may take halves for all that is not in fewer bits.
    """
    matrix = {name: node["scheme"] for name, node in nodes.items() if node["operator"] in MATRIX_OPERATORS}
    exact = {"fp32": "fp32"} if _HALVES & {*matrix.values()} else {}
    return {name: (_COMPUTED | exact)[scheme] for name, scheme in matrix.items() if scheme in _COMPUTED | exact}


def layer_path(component: str, node: str) -> str:
    """What a scope of a recipe calls a node: of vision, `vision.project` for `project/Gemm`, else `vision.MatMul`."""
    return f"{component}.{node.rpartition('/')[0] or node}"


def by_node(nodes: Sequence[Node], kernels: Iterable[tuple[Sequence[str], str]]) -> dict[str, str]:
    """The precision of every matrix node among `nodes`, those of a graph, that can be found behind a kernel.

    `kernels` are the backend's matrix kernels: the names of what each was made from, and its precision. A name is that
    of a node or of a tensor that one makes, or begins with it. A kernel that is named after an activation is that of
    the matrix node in front of it.
    """
    named = {node.name: node for node in nodes}
    made = {output: node for node in nodes for output in node.outputs if output}
    found: dict[str, str] = {}
    later: list[tuple[Node, str]] = []
    for names, precision in kernels:
        known = [node for node in (_nearest(name, named, made) for name in names) if node]
        products = [node for node in known if node.operator in MATRIX_OPERATORS]
        for node in products:
            found.setdefault(node.name, precision)
        if not products:
            later += [(node, precision) for node in known[:1]]
    for node, precision in later:
        front: Node | None = node
        while front and front.operator not in MATRIX_OPERATORS:
            front = made.get(front.inputs[0]) if front.inputs else None
        if front:
            found.setdefault(front.name, precision)
    return found


def _nearest(name: str, named: Mapping[str, Node], made: Mapping[str, Node]) -> Node | None:
    """The node of that name or tensor, or else the one of the longest name that `name` goes on from by `/` or `_`."""
    if node := named.get(name) or made.get(name):
        return node
    for end in range(len(name) - 1, 0, -1):
        if name[end] in "/_" and (node := named.get(name[:end]) or made.get(name[:end])):
            return node
    return None
