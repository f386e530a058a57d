"""What a GPU computes of FP16, BF16, FP8, INT4 and NVFP4, in FP32 operators with explicit rounding, so that a CPU can.

ONNX Runtime 1.31 computes FP16 graphs in FP32 on a CPU and rounds nothing: an overflow would pass every gate there.
BF16 and FP4 it does not run at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.artifact.graph import Graph
from vlaopt.graph.external import array, decode, encode
from vlaopt.graph.topology import constants, tensor_names, unique
from vlaopt.quantization.halves import HALVES, element_types
from vlaopt.quantization.placement import finished
from vlaopt.tensors import Array

_HALVES = frozenset(HALVES.values())
_LOW_BITS = frozenset({TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1})
_FLOAT = TensorProto.FLOAT


def rounded(graph: Graph, component: str) -> Graph:
    """`graph` with the same numbers in FP32 operators; itself when a CPU computes it as it says.

    A tensor in half precision becomes an FP32 one that holds half's numbers; FP8 activations are divided by their
    scale, cast and multiplied back; weights are FP32 constants of the values that their codes stand for. Products add
    up in FP32, as they do on a GPU. Int8 stays as it is.
    """
    model = decode(graph)
    kinds = element_types(model)
    if not (_HALVES | _LOW_BITS) & set(kinds.values()):
        return graph
    return encode(_Writer(model, kinds, graph.data).write(), component, graph.data)


def dequantized(codes: Array, scale: Array, axis: int, block: int) -> Array:
    """The float32 values of constant codes. `block` 0 has one scale per index of `axis`, or one for all."""
    scale = np.asarray(scale, np.float32)
    if block:
        scale = np.repeat(scale, block, axis=axis)
    elif scale.ndim:
        scale = scale.reshape([-1 if at == axis % codes.ndim else 1 for at in range(codes.ndim)])
    return np.asarray(codes.astype(np.float32) * scale)


class _Writer:
    def __init__(self, model: ModelProto, kinds: Mapping[str, int], data: bytes) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._graph = self._model.graph
        self._kinds, self._data = kinds, data
        self._taken = tensor_names(self._graph)
        self._nodes: list[NodeProto] = []
        self._values: dict[str, Array] = {}

    def write(self) -> ModelProto:
        for name, tensor in constants(self._graph).items():
            if tensor.data_type in _HALVES:
                self._fix(name, array(tensor, self._data).astype(np.float32))
        for node in self._graph.node:
            if node.op_type == "DequantizeLinear" and self._low(node.input[0]):
                self._dequantize(node)
            elif node.op_type == "QuantizeLinear" and self._low(node.output[0]):
                self._quantize(node)
            else:
                self._node(node)
        fixed = [tensor for tensor in self._graph.initializer if tensor.name not in self._values]
        fixed += [numpy_helper.from_array(value, name) for name, value in self._values.items()]
        copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in fixed]
        del self._graph.initializer[:]
        self._graph.initializer.extend(copies)
        stale = [value for value in self._graph.value_info if self._kinds.get(value.name) not in _HALVES | _LOW_BITS]
        del self._graph.value_info[:]
        self._graph.value_info.extend(stale)
        return finished(self._model, self._nodes, self._data)

    def _low(self, name: str) -> bool:
        return self._kinds.get(name) in _LOW_BITS

    def _fix(self, name: str, value: Array) -> None:
        self._values[name] = value

    def _constant(self, name: str) -> Array | None:
        if name in self._values:
            return self._values[name]
        tensor = constants(self._graph).get(name)
        return array(tensor, self._data) if tensor is not None else None

    def _dequantize(self, node: NodeProto) -> None:
        codes, scale = self._constant(node.input[0]), self._constant(node.input[1])
        attributes = {entry.name: entry.i for entry in node.attribute}
        output, kind = node.output[0], self._kinds[node.output[0]]
        if codes is None:  # an activation in FP8, cast back to FP32 by `_quantize`
            scaled = self._rounds(output, kind)
            self._nodes.append(helper.make_node("Mul", [node.input[0], node.input[1]], [scaled], name=node.name))
            self._round(scaled, output, kind)
            return
        assert scale is not None
        values = dequantized(codes, scale, attributes.get("axis", 1), attributes.get("block_size", 0))
        self._fix(output, _to(values, kind))

    def _quantize(self, node: NodeProto) -> None:
        output = node.output[0]
        divided, cast = (unique(f"{output}_{part}", self._taken) for part in ("divided", "cast"))
        self._nodes.extend(
            [
                helper.make_node("Div", list(node.input[:2]), [divided], name=node.name),
                helper.make_node("Cast", [divided], [cast], name=f"{node.name}/round", to=self._kinds[output]),
                helper.make_node("Cast", [cast], [output], name=f"{node.name}/back", to=_FLOAT),
            ]
        )

    def _node(self, node: NodeProto) -> None:
        if node.op_type == "Constant" and node.output[0] in self._values:
            return
        written = NodeProto()
        written.CopyFrom(node)
        halves = [(at, self._kinds[name]) for at, name in enumerate(node.output) if self._kinds.get(name) in _HALVES]
        for entry in written.attribute:
            if node.op_type == "Cast" and entry.name == "to" and entry.i in _HALVES:
                entry.i = _FLOAT
        for at, kind in halves:
            written.output[at] = self._rounds(node.output[at], kind)
        self._nodes.append(written)
        for at, kind in halves:
            self._round(written.output[at], node.output[at], kind)

    def _rounds(self, name: str, kind: int) -> str:
        """The name of what is rounded to `name`: itself where its type is FP32 and nothing is."""
        return unique(f"{name}_exact", self._taken) if kind in _HALVES else name

    def _round(self, exact: str, output: str, kind: int) -> None:
        if kind not in _HALVES:
            return
        half = unique(f"{output}_half", self._taken)
        self._nodes.append(helper.make_node("Cast", [exact], [half], name=f"{output}/round", to=kind))
        self._nodes.append(helper.make_node("Cast", [half], [output], name=f"{output}/back", to=_FLOAT))


def _to(values: Array, kind: int) -> Array:
    """float32 values, rounded to a type where it is half."""
    if kind not in _HALVES:
        return values
    dtype = np.float16 if kind == TensorProto.FLOAT16 else ml_dtypes.bfloat16
    return values.astype(dtype).astype(np.float32)
