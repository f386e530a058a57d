"""A component's portable graph as bytes: an ONNX file, and the file beside it that holds its weights above 2 GB.

What is asked of it here is read without onnx, which a robot lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vlaopt.errors import InputError

MARK = "vlaopt.computes_in"
"""The key of a node's metadata whose value, bf16 or fp16, is what backends that take no casts compute it in."""


@dataclass(frozen=True)
class Node:
    """One node of a graph: its name, its operator, and the tensors that it takes and gives.

    `computes_in` is the half that it is marked to compute in (see `MARK`), "" where it is not.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    computes_in: str = ""


@dataclass(frozen=True)
class GraphTensor:
    """One input or output of a graph: its name, its element type (numpy's name, or as in onnx), its shape.

    A dynamic dimension is its name in the graph, "" where it has none.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


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
        """The nodes of the graph itself, not of subgraphs, in its order.

        Raises InputError when the bytes are no ONNX file.
        """
        with _read_as_onnx():
            return tuple(map(_node, self._parts(_NODE_OF_GRAPH)))

    def inputs(self) -> tuple[GraphTensor, ...]:
        """What the graph takes, in its order, without weights that are named among its inputs; raises as `nodes`."""
        with _read_as_onnx():
            weights = {name for data in self._parts(_WEIGHT_OF_GRAPH) for name in _texts(data, _NAME_OF_WEIGHT)}
            tensors = map(_tensor, self._parts(_INPUT_OF_GRAPH))
            return tuple(tensor for tensor in tensors if tensor.name not in weights)

    def outputs(self) -> tuple[GraphTensor, ...]:
        """What the graph gives, in its order; raises as `nodes`."""
        with _read_as_onnx():
            return tuple(map(_tensor, self._parts(_OUTPUT_OF_GRAPH)))

    def dtypes(self) -> frozenset[str]:
        """The element types of its weights, inputs and outputs, and those that its nodes cast to; raises as `nodes`."""
        with _read_as_onnx():
            codes = [code for data in self._parts(_WEIGHT_OF_GRAPH) for code in _numbers(data, _DTYPE_OF_WEIGHT)]
            for attribute in (part for data in self._parts(_NODE_OF_GRAPH) for part in _parts(data, _ATTRIBUTE)):
                if _texts(attribute, _NAME_OF_ATTRIBUTE) in _NAMING_A_DTYPE:
                    codes += _numbers(attribute, _INTEGER_OF_ATTRIBUTE)
                for constant in _parts(attribute, _TENSOR_OF_ATTRIBUTE):
                    codes += _numbers(constant, _DTYPE_OF_WEIGHT)
        return frozenset({*map(_dtype, codes), *(tensor.dtype for tensor in (*self.inputs(), *self.outputs()))})

    def _parts(self, field_of_graph: int) -> Iterator[memoryview]:
        return (
            part for graph in _parts(memoryview(self.model), _GRAPH_OF_MODEL) for part in _parts(graph, field_of_graph)
        )


@contextmanager
def _read_as_onnx() -> Iterator[None]:
    try:
        yield
    except (IndexError, ValueError) as error:
        raise InputError("not an ONNX graph: its bytes end early or make no sense") from error


# Numbers of fields in onnx.proto, and the wire types of Protocol Buffers (protobuf.dev/programming-guides/encoding).
_GRAPH_OF_MODEL, _NODE_OF_GRAPH, _WEIGHT_OF_GRAPH, _INPUT_OF_GRAPH, _OUTPUT_OF_GRAPH = 7, 1, 5, 11, 12
_INPUT, _OUTPUT, _NAME, _OPERATOR, _ATTRIBUTE, _METADATA = 1, 2, 3, 4, 5, 9
_KEY, _VALUE = 1, 2
_NAME_OF_ATTRIBUTE, _INTEGER_OF_ATTRIBUTE, _TENSOR_OF_ATTRIBUTE = 1, 3, 5
_DTYPE_OF_WEIGHT, _NAME_OF_WEIGHT = 2, 8
_NAME_OF_VALUE, _TYPE_OF_VALUE, _TENSOR_OF_TYPE, _DTYPE_OF_TYPE, _SHAPE_OF_TYPE = 1, 2, 1, 1, 2
_DIMENSION, _SIZE_OF_DIMENSION, _NAME_OF_DIMENSION = 1, 1, 2
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5

_NAMING_A_DTYPE = (("to",), ("output_dtype",), ("dtype",))
"""Attributes of Cast, QuantizeLinear and makers of tensors whose integer is an element type."""
# TensorProto.DataType of onnx.proto.
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    17: "float8e4m3fn",
    19: "float8e5m2",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
}


def _dtype(code: int) -> str:
    return _DTYPES.get(code, f"type {code}")


def _node(data: memoryview) -> Node:
    name, operator = "".join(_texts(data, _NAME)), "".join(_texts(data, _OPERATOR))
    told = {_texts(entry, _KEY): "".join(_texts(entry, _VALUE)) for entry in _parts(data, _METADATA)}
    return Node(name, operator, _texts(data, _INPUT), _texts(data, _OUTPUT), told.get((MARK,), ""))


def _tensor(data: memoryview) -> GraphTensor:
    kinds = [kind for value in _parts(data, _TYPE_OF_VALUE) for kind in _parts(value, _TENSOR_OF_TYPE)]
    codes = [code for kind in kinds for code in _numbers(kind, _DTYPE_OF_TYPE)]
    shape = (size for kind in kinds for sizes in _parts(kind, _SHAPE_OF_TYPE) for size in _parts(sizes, _DIMENSION))
    return GraphTensor(
        "".join(_texts(data, _NAME_OF_VALUE)), _dtype(codes[-1] if codes else 0), tuple(map(_dimension, shape))
    )


def _dimension(data: memoryview) -> int | str:
    sizes = _numbers(data, _SIZE_OF_DIMENSION)
    return sizes[0] if sizes else "".join(_texts(data, _NAME_OF_DIMENSION))


def _texts(data: memoryview, wanted: int) -> tuple[str, ...]:
    return tuple(str(part, "utf-8") for part in _parts(data, wanted))


def _parts(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The values of the field `wanted` that are counted bytes, none of them copied."""
    return (value for number, value in _fields(data) if number == wanted and isinstance(value, memoryview))


def _numbers(data: memoryview, wanted: int) -> list[int]:
    """The values of the field `wanted` that are integers."""
    return [value for number, value in _fields(data) if number == wanted and isinstance(value, int)]


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of every field of a message; fixed-size values are stepped over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _COUNTED:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field ends behind its message")
            yield number, data[at : at + size]
            at += size
        elif kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
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
