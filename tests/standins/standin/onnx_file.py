"""ONNX files read without onnx, as far as a stand-in for TensorRT must: nodes, weights, ports, element types.

Field numbers are those of onnx.proto, wire types those of Protocol Buffers.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TYPES = {
    1: "FLOAT", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "STRING", 9: "BOOL",
    10: "HALF", 11: "DOUBLE", 12: "UINT32", 13: "UINT64", 16: "BF16", 17: "FP8", 18: "FP8", 19: "FP8", 20: "FP8",
    21: "UINT4", 22: "INT4", 23: "FP4", 24: "E8M0",
}  # fmt: skip
BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT8": 8, "UINT8": 8, "INT32": 32, "INT64": 64, "BOOL": 8, "FP8": 8}
BITS |= {"INT4": 4, "UINT4": 4, "FP4": 4, "DOUBLE": 64, "E8M0": 8}

_TRUTH = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"}
_COUNTS = {"Shape", "Size", "NonZero", "ArgMax", "ArgMin"}


@dataclass(frozen=True)
class Tensor:
    """An initializer: `bits` per element come from its type; `zero` when every element is known to be 0."""

    name: str
    type: str
    shape: tuple[int, ...]
    zero: bool
    file: str = ""

    @property
    def count(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size(self) -> int:
        return self.count * BITS.get(self.type, 32) // 8


@dataclass(frozen=True)
class Node:
    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Port:
    """A graph input or output; a dimension is a number, or the name of a dynamic one."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    types: Mapping[str, str]
    opset: int

    @property
    def producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs if name}

    @property
    def quantized(self) -> bool:
        return any(node.operator in ("QuantizeLinear", "DequantizeLinear") for node in self.nodes)

    @property
    def consumers(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return found


def read(data: bytes) -> OnnxGraph:
    """The main graph of an ONNX file. Raises ValueError when the bytes are none."""
    try:
        model = _fields(memoryview(data))
        graph = _fields(model[7][0])
        opset = next((_integer(entry.get(2, [0])[0]) for entry in map(_fields, model[8]) if not _text(entry, 1)), 0)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError("not an ONNX file") from error
    nodes = tuple(_node(part, index) for index, part in enumerate(graph[1]))
    weights = {tensor.name: tensor for tensor in map(_tensor, graph[5])}
    inputs = tuple(port for port in map(_port, graph[11]) if port.name not in weights)
    outputs = tuple(map(_port, graph[12]))
    known = {port.name: port.type for port in map(_port, graph[13])}
    known |= {port.name: port.type for port in (*inputs, *outputs)} | {t.name: t.type for t in weights.values()}
    types: dict[str, str] = {port.name: port.type for port in inputs} | {t.name: t.type for t in weights.values()}
    for node in nodes:
        types |= _given(node, types, known)
    return OnnxGraph(nodes, weights, inputs, outputs, types, opset)


def _given(node: Node, types: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The element types of a node's outputs: what the file says, else what the operator makes of its inputs."""
    first = [types.get(name, "FLOAT") for name in node.inputs] or ["FLOAT"]
    kind = first[0]
    attributes = node.attributes
    if node.operator == "Cast" or ("dtype" in attributes and node.operator.startswith(("Random", "Eye", "Bernoulli"))):
        kind = TYPES.get(attributes.get("to", attributes.get("dtype", 1)), "FLOAT")
    elif node.operator == "QuantizeLinear":
        kind = first[2] if len(first) > 2 and node.inputs[2] else TYPES.get(attributes.get("output_dtype", 2), "UINT8")
    elif node.operator in ("DequantizeLinear", "CastLike", "Where"):
        kind = first[1]
    elif node.operator in ("Constant", "ConstantOfShape"):
        value = attributes.get("value")
        kind = value.type if isinstance(value, Tensor) else "INT64" if "value_ints" in attributes else "FLOAT"
    elif node.operator in _TRUTH:
        kind = "BOOL"
    elif node.operator in _COUNTS:
        kind = "INT64"
    given = {name: known.get(name, kind) for name in node.outputs if name}
    if node.operator == "TopK" and len(node.outputs) > 1:
        given[node.outputs[1]] = "INT64"
    return given


def _node(data: memoryview, index: int) -> Node:
    fields = _fields(data)
    attributes = {}
    for part in map(_fields, fields[5]):
        if part[5]:
            value: Any = _tensor(part[5][0])
        elif part[8]:
            value = [_integer(item) for item in _unpacked(part[8])]
        elif part[4]:
            value = bytes(part[4][0])
        elif part[3]:
            value = _signed(part[3][0])
        else:
            value = None
        attributes[_text(part, 1)] = value
    inputs, outputs = (tuple(str(part, "utf-8") for part in fields[number]) for number in (1, 2))
    operator = _text(fields, 4)
    return Node(_text(fields, 3) or f"node_of_{outputs[0]}", operator, _text(fields, 7), inputs, outputs, attributes)


def _tensor(data: memoryview) -> Tensor:
    fields = _fields(data)
    raw = bytes(fields[9][0]) if fields[9] else b""
    numbers = [item for number in (5, 7) for item in _unpacked(fields[number])]
    zero = not any(raw) and not any(numbers) and not fields[4] and not fields[13]
    place = {_text(entry, 1): _text(entry, 2) for entry in map(_fields, fields[13])}
    shape = tuple(_signed(item) for item in _unpacked(fields[1]))
    return Tensor(_text(fields, 8), TYPES.get(_first(fields, 2), "FLOAT"), shape, zero, place.get("location", ""))


def _port(data: memoryview) -> Port:
    fields = _fields(data)
    if not fields[2] or not (tensor := _fields(fields[2][0])[1]):
        return Port(_text(fields, 1), "FLOAT", ())
    inner = _fields(tensor[0])
    shape: list[int | str] = []
    for dim in _fields(inner[2][0])[1] if inner[2] else []:
        part = _fields(dim)
        shape.append(_signed(part[1][0]) if part[1] else _text(part, 2) or "?")
    return Port(_text(fields, 1), TYPES.get(_first(inner, 1), "FLOAT"), tuple(shape))


def _text(fields: Mapping[int, list[Any]], number: int) -> str:
    return str(fields[number][0], "utf-8") if fields.get(number) else ""


def _first(fields: Mapping[int, list[Any]], number: int) -> int:
    return _integer(fields[number][0]) if fields[number] else 0


def _integer(value: Any) -> int:
    return int(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _unpacked(parts: list[Any]) -> list[int]:
    """The numbers of a repeated field, packed or not."""
    numbers: list[int] = []
    for part in parts:
        if isinstance(part, int):
            numbers.append(part)
            continue
        at = 0
        while at < len(part):
            value, at = varint(part, at)
            numbers.append(value)
    return numbers


def _fields(data: memoryview) -> defaultdict[int, list[Any]]:
    """The values by field number: numbers for varints, memory for what is counted."""
    found: defaultdict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(data, at)
        elif kind == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = data[at : at + size], at + size
        else:
            raise KeyError(kind)
        if at > len(data):
            raise IndexError(at)
        found[number].append(value)
    return found


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number of variable length at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
