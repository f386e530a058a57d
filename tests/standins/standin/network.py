"""A network defined layer by layer instead of parsed: as much of it as a sum of products and casts needs.

It becomes an ONNX file, written here byte by byte, which is then parsed as any other: nothing else needs to know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from standin import parsing

LAYERS = ("IConstantLayer", "ICastLayer", "IElementWiseLayer")

_CODES = {"FLOAT": 1, "INT8": 3, "INT32": 6, "INT64": 7, "BOOL": 9, "HALF": 10, "BF16": 16}
_OPERATORS = {"SUM": "Add", "PROD": "Mul", "SUB": "Sub", "DIV": "Div", "MAX": "Max", "MIN": "Min"}


class Weights:
    """Values of a constant: as in the library, a view of the caller's array, which must live until the build."""

    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)

    def __init__(self, array: Any) -> None:
        self.__dict__["_array"] = np.asarray(array)

    def numpy(self) -> Any:
        return self._array


class ByHand:
    """The methods of INetworkDefinition that add one thing."""

    def add_input(self: Any, name: str, dtype: Any, shape: Any) -> Any:
        made = _tensor(self, name, dtype, shape, "input")
        _drawn(self)["inputs"].append(made)
        self._io[0].append(made)
        return made

    def add_constant(self: Any, shape: Any, weights: Any) -> Any:
        dtype = self._surface.names["DataType"].__members__[_kind(weights._array.dtype)]
        if int(np.prod(tuple(shape))) != weights._array.size:
            return None
        return _add(self, "IConstantLayer", "CONSTANT", weights._array, [], _tensor(self, "", dtype, shape))

    def add_cast(self: Any, tensor: Any, to_type: Any) -> Any:
        return _add(self, "ICastLayer", "CAST", "Cast", [tensor], _tensor(self, "", to_type, tensor._shape))

    def add_elementwise(self: Any, first: Any, second: Any, op: Any) -> Any:
        if op.name not in _OPERATORS:
            raise NotImplementedError(f"stand-in: elementwise {op.name} is not written")
        if first._dtype != second._dtype or len(first._shape) != len(second._shape):
            return None  # strongly typed: both of one type; and both of as many dimensions
        shape = np.broadcast_shapes(tuple(first._shape), tuple(second._shape))
        made = _tensor(self, "", first._dtype, shape)
        return _add(self, "IElementWiseLayer", "ELEMENTWISE", _OPERATORS[op.name], [first, second], made)

    def mark_output(self: Any, tensor: Any) -> None:
        tensor.__dict__["_mode"] = "output"
        self._io[1].append(tensor)
        data = _written(self)
        found = parsing.parse(data, None, strong=self._strong, lane=self._surface.lane)
        if found.graph is None:
            raise NotImplementedError(f"stand-in: {found.fault}")
        self.__dict__.update(_graph=found.graph, _model=data)


def _drawn(network: Any) -> dict[str, list[Any]]:
    drawn: dict[str, list[Any]] = network.__dict__.setdefault("_by_hand", {"inputs": [], "layers": []})
    return drawn


def _tensor(network: Any, name: str, dtype: Any, shape: Any, mode: str = "") -> Any:
    sizes = [int(size) for size in shape]
    name = name or f"(Unnamed Layer* {len(_drawn(network)['layers'])})_output"
    return network._surface.names["ITensor"].make(_name=name, _dtype=dtype, _shape=sizes, _dims=sizes, _mode=mode)


def _add(network: Any, kind: str, layer: str, does: Any, inputs: list[Any], output: Any) -> Any:
    names = network._surface.names
    made = names[kind].make(
        _name=f"(Unnamed Layer* {len(_drawn(network)['layers'])}) [{layer}]",
        _type=names["LayerType"].__members__[layer], _metadata="", _inputs=inputs, _outputs=[output], _node=None,
        _precision=None, _types={},
    )  # fmt: skip
    _drawn(network)["layers"].append((does, inputs, output))
    network._layers.append(made)
    return made


def _kind(dtype: np.dtype[Any]) -> str:
    return {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "int8": "INT8"}[dtype.name]


def _written(network: Any) -> bytes:
    """The ONNX file: field numbers are those of onnx.proto."""
    graph = b""
    for index, (does, inputs, output) in enumerate(_drawn(network)["layers"]):
        if not isinstance(does, str):
            dims = b"".join(_number(1, size) for size in output._shape)
            code = _number(2, _CODES[output._dtype.name])
            graph += _block(5, dims + code + _text(8, output._name) + _block(9, does.tobytes()))
            continue
        node = b"".join(_text(1, tensor._name) for tensor in inputs) + _text(2, output._name)
        node += _text(3, f"layer {index}") + _text(4, does)
        if does == "Cast":
            node += _block(5, _text(1, "to") + _number(3, _CODES[output._dtype.name]) + _number(20, 2))
        graph += _block(1, node)
    graph += _text(2, "network")
    graph += b"".join(_block(11, _port(tensor)) for tensor in network._io[0])
    graph += b"".join(_block(12, _port(tensor)) for tensor in network._io[1])
    return _number(1, 10) + _block(7, graph) + _block(8, _text(1, "") + _number(2, 20))


def _port(tensor: Any) -> bytes:
    shape = b"".join(_block(1, _number(1, size)) for size in tensor._shape)
    kind = _number(1, _CODES[tensor._dtype.name]) + _block(2, shape)
    return _text(1, tensor._name) + _block(2, _block(1, kind))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _block(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _block(field, text.encode())
