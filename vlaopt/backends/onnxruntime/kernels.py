"""What ONNX Runtime ran: kernels by node, operator, provider and precision, from the events of its profile."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine
from vlaopt.backends.audit import by_node

_PRECISIONS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "int8": "int8",
    "uint8": "int8",
}
_MATRIX_KERNEL = re.compile(r"Conv|MatMul|Gemm|LSTM|GRU|RNN|Attention|Einsum")
_INTEGER_KERNEL = re.compile(r"QLinear|QGemm|DynamicQuantize|\w+Integer")
_FUSED = "fused "
"""What ONNX Runtime puts before the name of a Gemm that it joins with the activation behind it."""
# These take packed low-bit weights in uint8 but calculate in the type of their first input.
_WEIGHT_ONLY = ("MatMulNBits", "MatMulBnb4")


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran: its node's name, operator, provider and the element types of its inputs."""

    name: str
    operator: str
    provider: str
    input_types: tuple[str, ...]

    @property
    def precision(self) -> str:
        """What it calculates in: int8 as soon as one operand is 8-bit, else the type of its first input.

        A kernel whose name says integers has no other form; weights it packed beforehand are not among its inputs.
        """
        if _INTEGER_KERNEL.match(self.operator):
            return "int8"
        types = self.input_types[:1] if self.operator in _WEIGHT_ONLY else self.input_types
        if any(kind in ("int8", "uint8") for kind in types):
            return "int8"
        return _PRECISIONS.get(types[0], types[0]) if types else "unknown"


def kernels_of(events: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    found: dict[tuple[str, str], Kernel] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        types = tuple(kind for entry in facts["input_type_shape"] for kind in entry)
        name = event["name"].removesuffix("_kernel_time")
        found[name, facts["node_index"]] = Kernel(name, facts["op_name"], facts["provider"], types)
    return list(found.values())


def engine_of(graph: Graph, kernels: Sequence[Kernel], files: Mapping[str, bytes], notes: Iterable[str] = ()) -> Engine:
    """The engine of `files`, with what its kernels tell: matrix layers and their precision, providers, the rest."""
    products = [kernel for kernel in kernels if _MATRIX_KERNEL.search(kernel.operator)]
    rest = Counter(kernel.operator for kernel in kernels if not _MATRIX_KERNEL.search(kernel.operator))
    others = "other kernels: " + (", ".join(f"{n} {name}" for name, n in sorted(rest.items())) or "none")
    return Engine(
        files=files,
        precisions=dict(sorted(Counter(kernel.precision for kernel in products).items())),
        notes=(*notes, others),
        layers=by_node(graph.nodes(), [((kernel.name.removeprefix(_FUSED),), kernel.precision) for kernel in products]),
        facts={"providers": dict(sorted(Counter(kernel.provider for kernel in kernels).items()))},
    )
