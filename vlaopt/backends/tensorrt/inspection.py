"""What an engine tells of itself: the precision of its layers, reformats, fusions lost, memory.

Read from the engine inspector's JSON, which `trtexec --exportLayerInfo` writes too. Layers are records in both forms of
it: TensorRT 10 has `Bindings` beside them and one text for format and type of a tensor, 11 has `I/O Tensors` and two.
TensorRT for RTX logs the same fields when it builds, one layer a line, which needs no driver.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlaopt.artifact.graph import Graph, Node
from vlaopt.backends.audit import MATRIX_OPERATORS, UNKNOWN, by_node
from vlaopt.errors import StageError

# How TensorRT's layers write element types, the narrowest first: `Int8`, `Row major linear FP16 format`, `BFloat16`.
_TYPES = {
    "fp4": r"fp4|e2m1",
    "int8": r"int8",
    "fp8": r"fp8|e4m3\w*|float8\w*",
    "fp16": r"half|fp16|float16",
    "bf16": r"bf16|bfloat16",
    "fp32": r"float|fp32|float32",
}
# Kernels of NVIDIA's xmma name the types of what they multiply: sm80_xmma_gemm_i8f32_i8i32_f32_tn computes in i8.
_MULTIPLIED = {
    "e2m1": "fp4",
    "i8": "int8",
    "e4m3": "fp8",
    "e5m2": "fp8",
    "f16": "fp16",
    "bf16": "bf16",
    "tf32": "fp32",
    "f32": "fp32",
}
_ANY = "|".join((*_MULTIPLIED, "i32"))
_TACTIC = re.compile(rf"_(?:{_ANY})(?:{_ANY})_({'|'.join(_MULTIPLIED)})(?:{_ANY})_")
_MATRIX_KERNEL = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|mha|lstm|rnn|gru", re.IGNORECASE)
# What the builder made a node into may follow its name: `[ONNX Layer: proj/Conv]__gemm_from_conv1x1`.
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[^\w/]|$|\[|__)")
_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: (?P<metadata>.*)"
)
_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_TURNING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Inspection:
    """What an engine tells: precisions and layers as in `vlaopt.backends.Engine`, facts as JSON values."""

    precisions: Mapping[str, int]
    layers: Mapping[str, str]
    facts: Mapping[str, Any]


def inspect(trt: Any, engine: Any, graph: Graph) -> Inspection:
    """What a deserialized engine of `graph` tells. Raises StageError when its inspector gives no JSON."""
    told = read(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON), graph)
    facts = {**told.facts, "layers": engine.num_layers, "activation_bytes": int(engine.device_memory_size_v2)}
    if hasattr(engine, "get_engine_stat"):  # from 10.16 on; before, only some layers tell theirs
        facts["weights_bytes"] = int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
    return Inspection(told.precisions, told.layers, facts)


def read(text: str, graph: Graph) -> Inspection:
    """What the inspector's JSON says of an engine of `graph`. Raises StageError when it is none.

    `precisions` counts nodes that multiply matrices, and kernels that do without telling whose; it is empty where the
    engine was built to tell nothing but names. The facts: `layers`, `reformats`, and in `fusions_lost` the
    DequantizeLinear nodes in front of a product that run as layers of their own instead of in it.
    """
    return _read(_records(text), graph)


def read_log(text: str, graph: Graph) -> Inspection:
    """What the lines that RTX logs at the end of a build say of an engine of `graph`, as `read` of the inspector."""
    return _read([_record(line) for line in map(_LINE.match, text.splitlines()) if line], graph)


def _read(layers: Sequence[Mapping[str, Any]], graph: Graph) -> Inspection:
    listed = graph.nodes()
    nodes = {node.name: node for node in listed}
    detailed = [layer for layer in layers if layer.get("Inputs") is not None]
    products = sorted(filter(lambda layer: _multiplies(layer, nodes), detailed), key=_generated)
    found = by_node(listed, [(names(layer), precision(layer)) for layer in products])
    nameless = [layer for layer in products if not _generated(layer) and not _told_of(layer, nodes)]
    counts = Counter(found.values()) + Counter(map(precision, nameless))
    facts: dict[str, Any] = {
        "layers": len(layers),
        "reformats": sum(_reformats(layer) for layer in layers),
        "fusions_lost": sorted({name for layer in layers for name in _lost(layer, nodes)} & _to_be_fused(nodes)),
    }
    if weights := sum(map(_weights, detailed)):
        facts["weights_bytes"] = weights
    return Inspection(dict(sorted(counts.items())), found, facts)


def names(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """The ONNX nodes that a layer was made from: by its metadata, else by its name, which joins them by `+` or `||`."""
    if told := tuple(dict.fromkeys(_ONNX_NODE.findall(layer.get("Metadata") or ""))):
        return told
    return tuple(part for part in re.split(r"\s*(?:\+|\|\|)\s*", layer["Name"]) if part)


def precision(layer: Mapping[str, Any]) -> str:
    """What a layer multiplies in: by its kernel's name, else by its weights, else the narrowest of its inputs.

    A layer that takes no numbers, such as one that only looks rows up, is told by its constants, else by what it gives.
    One that takes FP32 and holds nothing but halves casts on its way: a product does not mix them.
    """
    if kernel := _TACTIC.search(layer.get("TacticName") or ""):
        return _MULTIPLIED[kernel[1]]
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and (kind := _type(str(weights.get("Type", "")))):
        return kind
    taken, held, given = (
        [kind for kind in _TYPES if kind in map(_type, map(_written, layer.get(side) or ()))]
        for side in ("Inputs", "Constants", "Outputs")
    )
    if taken == ["fp32"] and held in (["fp16"], ["bf16"]):
        return held[0]
    return next(iter(taken + held + given), UNKNOWN)


def _records(text: str) -> list[dict[str, Any]]:
    try:
        layers = json.loads(text)["Layers"]
        return [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"the engine inspector gives no list of layers: {' '.join(text.split())[:200]}") from error


def _record(line: re.Match[str]) -> dict[str, Any]:
    """The fields of a logged layer as the inspector's JSON has them; of tensors the types alone."""
    fields: dict[str, Any] = {"Name": line["name"], "LayerType": line["type"]}
    for side in ("Inputs", "Constants", "Outputs"):
        fields[side] = [{"Datatype": kind} for kind in re.findall(r"Datatype: (\w+)", line[side.lower()] or "")]
    return {**fields, "TacticName": line["tactic"], "Metadata": line["metadata"]}


def _written(tensor: Mapping[str, Any]) -> str:
    return str(next((tensor[key] for key in ("Format/Datatype", "DataType", "Datatype") if key in tensor), ""))


def _type(written: str) -> str | None:
    return next((kind for kind, how in _TYPES.items() if re.search(rf"\b(?:{how})\b", written, re.IGNORECASE)), None)


def _generated(layer: Mapping[str, Any]) -> bool:
    """Whether a layer is code that was generated for several nodes: beside a product of its own, it may only move data.

    Kernels that multiply and nothing else come first where both name a node.
    """
    return layer.get("LayerType") == "kgen" and not _TACTIC.search(layer.get("TacticName") or "")


def _multiplies(layer: Mapping[str, Any], nodes: Mapping[str, Node]) -> bool:
    kind = f"{layer.get('LayerType', '')} {layer.get('TacticName', '')}"
    return not _reformats(layer) and (
        _MATRIX_KERNEL.search(kind) is not None
        or any(name in nodes and nodes[name].operator in MATRIX_OPERATORS for name in names(layer))
    )


def _told_of(layer: Mapping[str, Any], nodes: Mapping[str, Node]) -> bool:
    """Whether a product's layer leads to a node; what it names itself is looked at first, as most do."""
    named = any(name in nodes and nodes[name].operator in MATRIX_OPERATORS for name in names(layer))
    return named or bool(by_node(tuple(nodes.values()), [(names(layer), "")]))


def _reformats(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") == "Reformat" or layer["Name"].startswith("Reformatting CopyNode")


def _lost(layer: Mapping[str, Any], nodes: Mapping[str, Node]) -> Iterator[str]:
    """The DequantizeLinear nodes of a layer that is made of nothing but Q/DQ nodes."""
    known = [nodes[name] for name in names(layer) if name in nodes]
    if known and all(node.operator in _QUANTIZING for node in known):
        yield from (node.name for node in known if node.operator == "DequantizeLinear")


def _to_be_fused(nodes: Mapping[str, Node]) -> set[str]:
    """The DequantizeLinear nodes that a product takes its input from, directly or turned."""
    made = {output: node for node in nodes.values() for output in node.outputs}
    takers = [node for node in nodes.values() if node.operator in MATRIX_OPERATORS]
    behind = [made.get(tensor) for node in takers for tensor in node.inputs]
    behind += [made.get(node.inputs[0]) for node in behind if node and node.operator in _TURNING and node.inputs]
    return {node.name for node in behind if node and node.operator == "DequantizeLinear"}


def _weights(layer: Mapping[str, Any]) -> int:
    """Bytes of the weights and the bias that a layer tells of."""
    told = [layer[key] for key in ("Weights", "Bias") if isinstance(layer.get(key), Mapping)]
    return sum(int(part.get("Count", 0)) * _SIZES.get(_type(str(part.get("Type", ""))) or "", 0) for part in told)
