"""A component's portable graph as bytes: an ONNX file, and the file beside it that holds its weights above 2 GB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from vlaopt.errors import InputError


@dataclass(frozen=True)
class Node:
    """One node of a graph: its name, its operator, and the tensors that it takes and gives."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """`model` is the ONNX file; `data`, when not empty, the file `data_name` in the same folder that it points into."""

    model: bytes = field(repr=False)
    data: bytes = field(default=b"", repr=False)
    data_name: str = ""

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return len(self.model) + len(self.data)

    @property
    def digest(self) -> str:
        """SHA-256 of the model's bytes followed by those of the data, 64 lower-case hex digits."""
        sha = hashlib.sha256(self.model)
        sha.update(self.data)
        return sha.hexdigest()

    def files(self, name: str) -> dict[str, bytes]:
        """The bytes by file name, the model's being `name`."""
        return {name: self.model, self.data_name: self.data} if self.data else {name: self.model}

    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the graph itself, not of subgraphs, in its order. Read without onnx, which a robot lacks.

        Raises InputError when the bytes are no ONNX file.
        """
        try:
            return tuple(
                _node(data)
                for graph in _parts(memoryview(self.model), _GRAPH_OF_MODEL)
                for data in _parts(graph, _NODE_OF_GRAPH)
            )
        except (IndexError, ValueError) as error:
            raise InputError("not an ONNX graph: its bytes end early or make no sense") from error


# Numbers of fields in onnx.proto, and the wire types of Protocol Buffers (protobuf.dev/programming-guides/encoding).
_GRAPH_OF_MODEL, _NODE_OF_GRAPH = 7, 1
_INPUT, _OUTPUT, _NAME, _OPERATOR = 1, 2, 3, 4
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5


def _node(data: memoryview) -> Node:
    def texts(field_number: int) -> tuple[str, ...]:
        return tuple(str(part, "utf-8") for part in _parts(data, field_number))

    return Node("".join(texts(_NAME)), "".join(texts(_OPERATOR)), texts(_INPUT), texts(_OUTPUT))


def _parts(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The values of the field `wanted`, none of them copied; other fields are stepped over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _COUNTED:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field ends behind its message")
            if number == wanted:
                yield data[at : at + size]
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            at += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
