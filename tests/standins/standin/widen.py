"""BF16 made FP32 in an ONNX file, as ONNX Runtime has no BF16 on a CPU: the same graph, calculated more precisely.

Field numbers are those of onnx.proto; fields are copied in their order, so that nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from standin.onnx_file import varint

_BF16, _FLOAT = 16, 1
_TYPE_ATTRIBUTES = (b"to", b"dtype", b"output_dtype")

Change = Callable[[bytes], bytes]


def widened(model: bytes) -> bytes:
    """Raises NotImplementedError for BF16 weights in another file."""
    return _rewritten(model, {7: _graph})


def to_float32(words: bytes) -> np.ndarray:
    """BF16 words are the upper halves of FP32 ones."""
    return (np.frombuffer(words, "<u2").astype("<u4") << 16).view("<f4")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Words of the nearest BF16 numbers, ties to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _graph(data: bytes) -> bytes:
    return _rewritten(data, {1: _node, 5: _tensor, 11: _port, 12: _port, 13: _port})


def _node(data: bytes) -> bytes:
    return _rewritten(data, {5: _attribute})


def _attribute(data: bytes) -> bytes:
    names = [value for number, kind, value in _fields(data) if (number, kind) == (1, 2)]
    named = _rewritten(data, {5: _tensor, 6: _graph})
    if names and names[0] in _TYPE_ATTRIBUTES:
        return b"".join(_coded(n, k, _float_for(v) if (n, k) == (3, 0) else v) for n, k, v in _fields(named))
    return named


def _port(data: bytes) -> bytes:
    def tensor_type(inner: bytes) -> bytes:
        return b"".join(_coded(n, k, _float_for(v) if (n, k) == (1, 0) else v) for n, k, v in _fields(inner))

    return _rewritten(data, {2: lambda kind: _rewritten(kind, {1: tensor_type})})


def _tensor(data: bytes) -> bytes:
    parts = _fields(data)
    if (2, 0, _varint(_BF16)) not in parts:
        return data
    out, words = b"", b""
    for number, kind, value in parts:
        if number == 13:
            raise NotImplementedError("stand-in: BF16 weights in another file")
        if number == 9:
            words += value
        elif number == 5:
            words += np.asarray(_numbers(value), "<u2").tobytes()
        else:
            out += _coded(number, kind, _float_for(value) if number == 2 else value)
    return out + _coded(9, 2, to_float32(words).tobytes())


def _float_for(value: bytes) -> bytes:
    return _varint(_FLOAT) if value == _varint(_BF16) else value


def _rewritten(data: bytes, changes: dict[int, Change]) -> bytes:
    out = []
    for number, kind, value in _fields(data):
        changed = changes[number](value) if kind == 2 and number in changes else value
        out.append(_coded(number, kind, changed))
    return b"".join(out)


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Number, wire type and bytes of every field, in order."""
    found, at = [], 0
    while at < len(data):
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, end = varint(data, at)
            found.append((number, kind, _varint(value)))
        elif kind == 2:
            size, at = varint(data, at)
            end = at + size
            found.append((number, kind, data[at:end]))
        else:
            end = at + (8 if kind == 1 else 4)
            found.append((number, kind, data[at:end]))
        at = end
    return found


def _coded(number: int, kind: int, value: bytes) -> bytes:
    return _varint(number << 3 | kind) + (_varint(len(value)) if kind == 2 else b"") + value


def _numbers(data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = varint(data, at)
        found.append(value)
    return found


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
