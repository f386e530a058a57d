"""Is a quantized graph built as its backend wants it? That a builder accepts it proves nothing.

TensorRT for RTX reads uint8 Q/DQ nodes as int8 without a word, and an unused quantizer costs time and changes nothing.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.errors import StageError
from vlaopt.graph.topology import constants, consumers, producers
from vlaopt.quantization.placement import Activations
from vlaopt.quantization.weights import MATRIX_OPERATORS, weight_axes
from vlaopt.tensors import Array

QDQ = ("QuantizeLinear", "DequantizeLinear")
DYNAMIC = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})


def structural_check(model: ModelProto, activations: Activations) -> None:
    """Raise StageError, with the node's name, where a graph breaks the rules for its kind of backend.

    Both kinds: scales are constant, finite and positive; a quantizer is followed by dequantizers alone, and a
    dequantizer is used; scales per channel belong to weights and lie along the axis of the node that takes them. `int8`
    (TensorRT): int8 alone, zero points 0, float biases, no integer operators. `uint8` (CPU): uint8 activations, int8
    weights, int32 biases.
    """
    check = _Check(model.graph, activations)
    for node in model.graph.node:
        check.node(node)


def quantized_layers(model: ModelProto) -> list[str]:
    """The nodes that compute in 8 bit: products whose operands both come out of dequantizers, and integer products."""
    made = producers(model.graph)

    def dequantized(name: str) -> bool:
        return name in made and made[name].op_type == "DequantizeLinear"

    return [
        node.name
        for node in model.graph.node
        if node.op_type in DYNAMIC - {"DynamicQuantizeLinear"}
        or (node.op_type in MATRIX_OPERATORS and all(dequantized(name) for name in node.input[:2]))
    ]


class _Check:
    def __init__(self, graph: GraphProto, activations: Activations) -> None:
        self._activations = activations
        self._constants = constants(graph)
        self._takers = consumers(graph)
        self._given = {value.name for value in graph.output}

    def node(self, node: NodeProto) -> None:
        if node.op_type in DYNAMIC and self._activations == "int8":
            raise _broken(node, "has no form in TensorRT", "scheme int8-dynamic is for CPU targets")
        if node.op_type not in QDQ:
            return
        scale = self._scale(node)
        kind = self._kind(node)
        constant = node.input[0] in self._constants
        self._check_kind(node, kind, constant)
        self._check_takers(node)
        if scale.ndim:
            self._check_axis(node, scale, constant)

    def _scale(self, node: NodeProto) -> Array:
        if node.input[1] not in self._constants:
            raise _broken(node, "has a scale that is not constant")
        scale: Array = numpy_helper.to_array(self._constants[node.input[1]])
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise _broken(node, "has a scale that is not a positive number")
        return scale

    def _kind(self, node: NodeProto) -> int:
        """The element type of the codes; checks the zero point."""
        if len(node.input) < 3 or not node.input[2]:
            if node.op_type == "QuantizeLinear":
                return int(TensorProto.UINT8)
            constant = self._constants.get(node.input[0])
            return int(constant.data_type) if constant else int(TensorProto.UNDEFINED)
        if node.input[2] not in self._constants:
            raise _broken(node, "has a zero point that is not constant")
        zero_point = self._constants[node.input[2]]
        kind: int = zero_point.data_type
        if kind == TensorProto.INT8 and numpy_helper.to_array(zero_point).any():
            raise _broken(node, "has a zero point other than 0 in int8")
        return kind

    def _check_kind(self, node: NodeProto, kind: int, constant: bool) -> None:
        if kind == TensorProto.INT32 and node.op_type == "DequantizeLinear":
            if self._activations == "int8":
                raise _broken(node, "makes an int32 bias", "TensorRT takes biases in float")
            return
        wanted = TensorProto.INT8 if constant or self._activations == "int8" else TensorProto.UINT8
        if kind not in (wanted, TensorProto.UNDEFINED):
            names = TensorProto.DataType.Name(kind).lower(), TensorProto.DataType.Name(wanted).lower()
            raise _broken(node, f"is {names[0]} where {names[1]} is needed")

    def _check_takers(self, node: NodeProto) -> None:
        takers = self._takers.get(node.output[0], [])
        if node.op_type == "QuantizeLinear":
            if not takers or any(taker.op_type != "DequantizeLinear" for taker in takers):
                raise _broken(node, "is not followed by dequantizers alone")
        elif not takers and node.output[0] not in self._given:
            raise _broken(node, "is not used")

    def _check_axis(self, node: NodeProto, scale: Array, constant: bool) -> None:
        if not constant:
            raise _broken(node, "has scales per channel on an activation")
        dims = self._constants[node.input[0]].dims
        axis = next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == "axis"), 1)
        for taker in self._takers.get(node.output[0], []):
            wanted = _channel_axis(taker, node.output[0], len(dims))
            if axis != wanted:
                raise _broken(node, f"has its scales along axis {axis}, {taker.op_type} needs axis {wanted}")
        if scale.shape != (dims[axis],):
            raise _broken(node, f"has {scale.size} scales for {dims[axis]} channels")


def _channel_axis(node: NodeProto, tensor: str, rank: int) -> int | None:
    """The axis of outputs in the weight or bias `tensor` of a node; None where it takes no scales per channel."""
    if tensor in node.input[2:3] and node.op_type in ("Conv", "Gemm"):
        return 0
    return next((axis for at, axis in weight_axes(node, rank).items() if node.input[at] == tensor), None)


def _broken(node: NodeProto, problem: str, hint: str | None = None) -> StageError:
    return StageError(f"{node.op_type} {node.name!r} {problem}", hint=hint)
