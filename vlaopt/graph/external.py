"""Graphs whose weights lie outside, because one ONNX file cannot hold them; and reading and writing both kinds.

In memory such a graph is a `ModelProto`, in which every large weight only says where in the data it lies, and the bytes
of the data. Passes change the model; nothing changes the data, and nothing holds them twice.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import component_path, data_path
from vlaopt.errors import InputError
from vlaopt.graph.topology import graphs
from vlaopt.tensors import Array

LIMIT = 2_000_000_000
"""Bytes of weights in one ONNX file: protobuf ends at 2 GiB, and what backends add must fit too."""

SMALLEST = 1 << 18
"""Bytes of a tensor that lies outside when weights do; biases, norms and shapes stay where passes see them."""

Reader = Callable[[TensorProto], "bytes | memoryview"]
"""Gives the bytes of a tensor's values, little-endian."""

_ALIGNMENT = 4096  # pages, so that a runtime can map a weight into memory
_LAST = 1 << 29  # above every field number of protobuf
_KEYS = {"location", "offset", "length"}


def encode(model: ModelProto, component: str, data: bytes = b"") -> Graph:
    """The files of a component's graph. Its weights lie outside when they are above `LIMIT`, and only then.

    `data` is where those lie that are outside in `model`. Equal graphs give equal bytes.
    """
    return encode_from(model, component, lambda tensor: stored(tensor, data))


def encode_from(model: ModelProto, component: str, read: Reader) -> Graph:
    """As `encode`, where `read` gives the values of what lies outside. Holds one weight at a time twice in memory."""
    if sum(size(tensor) for tensor in model.graph.initializer) <= LIMIT:
        return Graph(_joined(model, read))
    name = PurePosixPath(data_path(component_path(component))).name
    result, packed = without_initializers(model), io.BytesIO()
    for tensor in model.graph.initializer:
        written = result.graph.initializer.add()
        if size(tensor) < max(SMALLEST, 1) and not is_outside(tensor):
            written.CopyFrom(tensor)
        else:
            packed.write(b"\0" * (-packed.tell() % _ALIGNMENT))
            place = packed.tell(), packed.write(read(tensor) if is_outside(tensor) else stored(tensor, b""))
            point(written, tensor.name, tensor.data_type, tensor.dims, name, place)
    return Graph(result.SerializeToString(deterministic=True), packed.getvalue(), name)


def decode(graph: Graph, *, where: str | None = None) -> ModelProto:
    """The model of `graph`. Raises InputError, placed at `where`, when it is damaged or points where it may not.

    What lies outside is an initializer of the graph itself, whole within the one file of data that `graph` has.
    """
    try:
        model = onnx.load_model_from_string(graph.model)
    except DecodeError as error:
        raise InputError("not an ONNX graph, or a damaged one", where=where, hint="export it again") from error
    for owner, tensor in tensors(model):
        if is_outside(tensor):
            problem = _misplaced(tensor, graph)
            if problem is None and not owner.startswith("initializer"):
                problem = "only initializers may be"
            if problem:
                raise InputError(f"{owner} is stored outside the graph: {problem}", where=where, hint="export it again")
    return model


def tensors(model: ModelProto) -> Iterable[tuple[str, TensorProto]]:
    """Every stored tensor with a label for people."""
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            yield f"initializer {tensor.name!r}", tensor
        for sparse in graph.sparse_initializer:
            yield f"initializer {sparse.values.name!r}", sparse.values
    for nodes in (*(graph.node for graph in graphs(model.graph)), *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                for tensor in (*((attribute.t,) if attribute.HasField("t") else ()), *attribute.tensors):
                    yield f"{attribute.name!r} of node {node.name!r} ({node.op_type})", tensor


def is_outside(tensor: TensorProto) -> bool:
    """Whether a tensor's values lie in the data."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def offset(tensor: TensorProto) -> int:
    """Where the values of one that lies outside begin."""
    return _place(tensor)[0]


def size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values by its type and shape."""
    if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
        return int(tensor.ByteSize())
    count: int = math.prod(tensor.dims)
    return -(-count * _bits(tensor.data_type) // 8)


def stored(tensor: TensorProto, data: bytes) -> bytes | memoryview:
    """The bytes of a tensor's values, little-endian; not copied when they lie outside."""
    if is_outside(tensor):
        start, length = _place(tensor)
        return memoryview(data)[start : start + length]
    raw: bytes = tensor.raw_data
    return raw or numpy_helper.to_array(tensor).tobytes()


def array(tensor: TensorProto, data: bytes) -> Array:
    """A tensor's values; read-only, and not copied, when they lie outside."""
    if not is_outside(tensor):
        values: Array = numpy_helper.to_array(tensor)
        return values
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(stored(tensor, data), dtype).reshape(tuple(tensor.dims))


def without_initializers(model: ModelProto) -> ModelProto:
    """A copy of everything else."""
    result = ModelProto()
    _copy(model, result, lambda field: field.name != "graph")
    _copy(model.graph, result.graph, lambda field: field.name != "initializer")
    return result


def light(model: ModelProto, *, least: int = 1 << 16) -> ModelProto:
    """A copy in which every initializer that lies outside, or is of `least` bytes and more, is an input without values.

    Checks and shape inference say the same of it, and need not carry the weights about.
    """
    result = without_initializers(model)
    given = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_outside(tensor) and size(tensor) < least:
            result.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in given:
            result.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return result


def structure(model: ModelProto) -> ModelProto:
    """A copy without the values of large weights, which say that they lie outside. For passes that look at no value."""
    result = without_initializers(model)
    for tensor in model.graph.initializer:
        written = result.graph.initializer.add()
        if size(tensor) < SMALLEST:
            written.CopyFrom(tensor)
        else:
            point(written, tensor.name, tensor.data_type, tensor.dims, "", (0, 0))
    return result


def point(
    tensor: TensorProto, name: str, data_type: int, dims: Iterable[int], data_name: str, place: tuple[int, int]
) -> None:
    """Make of an empty `tensor` one that lies outside, at `place` in the file `data_name`."""
    tensor.name, tensor.data_type, tensor.data_location = name, data_type, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in zip(("location", "offset", "length"), (data_name, *place), strict=True):
        tensor.external_data.add(key=key, value=str(value))


def _joined(model: ModelProto, read: Reader) -> bytes:
    """What `SerializeToString` gives when every weight is in the model, without ever having them all in a model."""
    at, graph_at = _number(GraphProto, "initializer"), _number(ModelProto, "graph")
    before, after = _fields(model.graph, range(at)), _fields(model.graph, range(at + 1, _LAST))
    starts = [_start(tensor, at) for tensor in model.graph.initializer]
    weights = sum(len(start) + length for start, length in starts)
    joined = io.BytesIO()
    joined.write(_fields(model, range(graph_at)))
    joined.write(_tag(graph_at, len(before) + weights + len(after)) + before)
    for tensor, (start, length) in zip(model.graph.initializer, starts, strict=True):
        joined.write(start)
        outside = is_outside(tensor)
        if joined.write(read(tensor) if outside else tensor.SerializeToString(deterministic=True)) != length:
            raise AssertionError(f"{tensor.name} has other bytes than its shape says")
    joined.write(after + _fields(model, range(graph_at + 1, _LAST)))
    return joined.getvalue()


def _start(tensor: TensorProto, number: int) -> tuple[bytes, int]:
    """The bytes of an initializer, field `number` of a graph, before its values; and how many are still to come."""
    if not is_outside(tensor):
        return _tag(number, tensor.ByteSize()), tensor.ByteSize()
    head = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims).SerializeToString()
    head += _tag(_number(TensorProto, "raw_data"), size(tensor))
    return _tag(number, len(head) + size(tensor)) + head, size(tensor)


def _fields(message: Any, numbers: range) -> bytes:
    """The serialised fields of these numbers. Protobuf writes fields in the order of their numbers."""
    part = type(message)()
    _copy(message, part, lambda field: field.number in numbers)
    written: bytes = part.SerializeToString(deterministic=True)
    return written


def _tag(number: int, length: int) -> bytes:
    """The start of a field that has a length: protobuf's encoding, https://protobuf.dev/programming-guides/encoding."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])


def _number(message: Any, field: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[field].number)


def _misplaced(tensor: TensorProto, graph: Graph) -> str | None:
    """Why a tensor that says it lies outside cannot be read, or None."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not graph.data:
        return f"in {location!r}, which is not there"
    if location != graph.data_name:
        return f"in {location!r}, and only {graph.data_name!r} beside it is read"
    if set(entries) != _KEYS or not all(
        entries[key].isdecimal() and len(entries[key]) < 20 for key in _KEYS - {"location"}
    ):
        return "it does not say where"
    start, length = _place(tensor)
    if length != size(tensor):
        return f"{length} bytes of it, its shape takes {size(tensor)}"
    if start + length > len(graph.data):
        return f"its bytes end at {start + length}, {location} has {len(graph.data)}"
    return None


def _place(tensor: TensorProto) -> tuple[int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["offset"]), int(entries["length"])


def _bits(data_type: int) -> int:
    packed = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}
    return packed.get(data_type) or int(helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def _copy(source: Any, target: Any, wanted: Callable[[Any], bool]) -> None:
    """The fields of one message that are set and `wanted`, to another of its kind."""
    for field, value in source.ListFields():
        if not wanted(field):
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)
