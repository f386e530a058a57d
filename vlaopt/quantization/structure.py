"""Is a quantized graph built as its backend wants it? That a builder accepts it proves nothing.

TensorRT for RTX reads uint8 Q/DQ nodes as int8 without a word, and an unused quantizer costs time and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.backends import Placement
from vlaopt.errors import StageError
from vlaopt.graph.topology import constants, consumers, producers
from vlaopt.quantization.weights import MATRIX_OPERATORS, weight_axes
from vlaopt.tensors import Array

QDQ = ("QuantizeLinear", "DequantizeLinear")
DYNAMIC = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})

_BIASED = ("Conv", "ConvTranspose", "Gemm")

_ACTIVATIONS = {
    "onnxruntime": {TensorProto.UINT8},
    "openvino": {TensorProto.UINT8, TensorProto.INT8},
    "tensorrt": {TensorProto.INT8, TensorProto.FLOAT8E4M3FN},
}
"""Element types of quantized activations per placement."""

_WEIGHTS = {
    "onnxruntime": {TensorProto.INT8, TensorProto.INT4},
    "openvino": {TensorProto.INT8, TensorProto.INT4},
    "tensorrt": {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1},
}
"""Element types of quantized weights per placement, scales of NVFP4 in FP8 among them."""

_BLOCKED = (TensorProto.INT4, TensorProto.FLOAT4E2M1)


@dataclass(frozen=True)
class Fault:
    """What a backend cannot take of a graph: the node, what is wrong with it, and what would mend it.

    `cure` is `precision` where computing the place in FP32 helps, `operator` where the graph must be written otherwise.
    """

    node: str
    operator: str
    reason: str
    cure: Literal["precision", "operator"]
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.operator} {self.node!r} {self.reason}"


def structural_check(model: ModelProto, placement: Placement) -> None:
    """Raise StageError, with the node's name, where a graph breaks the rules of `structural_fault`."""
    if fault := structural_fault(model, placement):
        raise StageError(str(fault), hint=fault.hint)


def structural_fault(model: ModelProto, placement: Placement) -> Fault | None:
    """The first place where the Q/DQ nodes of a graph break the rules for its kind of backend, or None.

    All: scales are constant, finite and positive; a quantizer is followed by dequantizers alone, and a dequantizer is
    used; scales per channel belong to weights and lie along the axis of the node that takes them; weights are int8;
    int8 has zero point 0; of a product of two activations both are quantized or neither. `tensorrt`: int8 alone, biases
    that were never quantized, no integer operators. `openvino`: float biases, no symmetric int8 straight behind a
    MatMul, with which it has crashed. `onnxruntime`: uint8 activations.
    """
    check = _Check(model.graph, placement)
    try:
        for node in model.graph.node:
            check.node(node)
    except _Broken as broken:
        return broken.fault
    return None


def quantized_layers(model: ModelProto) -> list[str]:
    """The nodes that compute in 8 bit: products whose operands both come out of dequantizers, and integer products."""
    made = producers(model.graph)

    def dequantized(name: str) -> bool:
        while name in made and made[name].op_type == "MaxPool":
            name = made[name].input[0]
        return name in made and made[name].op_type == "DequantizeLinear"

    return [
        node.name
        for node in model.graph.node
        if node.op_type in DYNAMIC - {"DynamicQuantizeLinear"}
        or (node.op_type in MATRIX_OPERATORS and all(dequantized(name) for name in node.input[:2]))
    ]


class _Check:
    def __init__(self, graph: GraphProto, placement: Placement) -> None:
        self._placement = placement
        self._constants = constants(graph)
        self._takers = consumers(graph)
        self._given = {value.name for value in graph.output}
        self._made = producers(graph)

    def node(self, node: NodeProto) -> None:
        if node.op_type in DYNAMIC and self._placement == "tensorrt":
            raise _broken(node, "has no form in TensorRT", "scheme int8-dynamic is for CPU targets")
        if node.op_type == "MatMul":
            self._check_operands(node)
        if node.op_type not in QDQ:
            return
        scale = self._scale(node)
        kind = self._kind(node)
        constant = node.input[0] in self._constants
        self._check_kind(node, kind, constant)
        self._check_takers(node)
        if scale.ndim:
            self._check_axis(node, scale, constant)

    def _check_operands(self, node: NodeProto) -> None:
        """Half a quantized product is computed in floats, behind a quantizer that only costs."""
        if any(name in self._constants or self._dequantizes_constant(name) for name in node.input):
            return
        dequantized = [name for name in node.input if self._operator(name) == "DequantizeLinear"]
        if len(dequantized) == 1:
            raise _broken(node, "multiplies a quantized tensor by one that is not")

    def _dequantizes_constant(self, tensor: str) -> bool:
        return self._operator(tensor) == "DequantizeLinear" and self._made[tensor].input[0] in self._constants

    def _operator(self, tensor: str) -> str:
        """The operator that makes a tensor; "" for inputs and constants."""
        return self._made[tensor].op_type if tensor in self._made else ""

    def _scale(self, node: NodeProto) -> Array:
        name = node.input[1]
        if name not in self._constants and self._operator(name) == "DequantizeLinear":
            name = self._made[name].input[0]  # NVFP4: the scales are codes themselves
        if name not in self._constants:
            raise _broken(node, "has a scale that is not constant")
        scale: Array = numpy_helper.to_array(self._constants[name]).astype(np.float32)
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
        if kind != TensorProto.UINT8 and numpy_helper.to_array(zero_point).any():
            raise _broken(node, f"has a zero point other than 0 in {TensorProto.DataType.Name(kind).lower()}")
        return kind

    def _check_kind(self, node: NodeProto, kind: int, constant: bool) -> None:
        if kind == TensorProto.INT32 and node.op_type == "DequantizeLinear":
            if self._placement != "onnxruntime":
                raise _broken(node, "makes an int32 bias", f"{self._placement} takes biases in float")
            return
        wanted = _WEIGHTS[self._placement] if constant else _ACTIVATIONS[self._placement]
        if kind not in (*wanted, TensorProto.UNDEFINED):
            found, *needed = (TensorProto.DataType.Name(entry).lower() for entry in (kind, *sorted(wanted)))
            raise _broken(node, f"is {found} where {' or '.join(needed)} is needed")
        if self._placement == "openvino" and node.op_type == "QuantizeLinear" and kind == TensorProto.INT8:
            self._check_product(node)

    def _check_product(self, node: NodeProto) -> None:
        """Symmetric int8 straight behind a MatMul is for the right operand of the next one alone."""
        results = [entry.output[0] for entry in self._takers.get(node.output[0], [])]
        left = [taker for name in results for taker in self._takers.get(name, []) if taker.input[0] == name]
        if left and self._operator(node.input[0]) == "MatMul":
            raise _broken(node, "is int8 behind a MatMul", "OpenVINO crashes when it compiles that; uint8 is safe")

    def _check_takers(self, node: NodeProto) -> None:
        takers = self._takers.get(node.output[0], [])
        if node.op_type == "QuantizeLinear":
            if not takers or any(taker.op_type != "DequantizeLinear" for taker in takers):
                raise _broken(node, "is not followed by dequantizers alone")
        elif not takers and node.output[0] not in self._given:
            raise _broken(node, "is not used")
        elif self._placement == "tensorrt" and (taker := _with_bias(node.output[0], takers)):
            raise _broken(node, f"makes the bias of {taker.name!r} in low precision", "TensorRT takes biases in float")

    def _check_axis(self, node: NodeProto, scale: Array, constant: bool) -> None:
        if not constant:
            raise _broken(node, "has scales per channel on an activation")
        dims = self._constants[node.input[0]].dims
        axis = next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == "axis"), 1)
        if block := next((entry.i for entry in node.attribute if entry.name == "block_size"), 0):
            self._check_blocks(node, scale, axis, block)
            return
        for taker in self._takers.get(node.output[0], []):
            wanted = _channel_axis(taker, node.output[0], len(dims))
            if axis != wanted:
                raise _broken(node, f"has its scales along axis {axis}, {taker.op_type} needs axis {wanted}")
        if scale.shape != (dims[axis],):
            raise _broken(node, f"has {scale.size} scales for {dims[axis]} channels")

    def _check_blocks(self, node: NodeProto, scale: Array, axis: int, block: int) -> None:
        tensor = self._constants[node.input[0]]
        if tensor.data_type not in _BLOCKED:
            raise _broken(node, f"has blocks of {TensorProto.DataType.Name(tensor.data_type).lower()}")
        for taker in self._takers.get(node.output[0], []):
            if len(tensor.dims) != 2 or _channel_axis(taker, node.output[0], 2) != 1 - axis:
                raise _broken(node, f"has its blocks along axis {axis}, not along the inputs of {taker.op_type}")
        wanted = tuple(size // block if at == axis else size for at, size in enumerate(tensor.dims))
        if scale.shape != wanted:
            raise _broken(node, f"has scales of shape {scale.shape} for blocks of shape {wanted}")


def _with_bias(tensor: str, takers: list[NodeProto]) -> NodeProto | None:
    """The node whose bias the tensor is, or None."""
    return next((taker for taker in takers if taker.op_type in _BIASED and tensor in taker.input[2:3]), None)


def _channel_axis(node: NodeProto, tensor: str, rank: int) -> int | None:
    """The axis of outputs in the weight or bias `tensor` of a node; None where it takes no scales per channel."""
    if tensor in node.input[2:3] and node.op_type in ("Conv", "Gemm"):
        return 0
    return next((axis for at, axis in weight_axes(node, rank).items() if node.input[at] == tensor), None)


class _Broken(Exception):
    """Ends a check at the first fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def _broken(node: NodeProto, problem: str, hint: str | None = None) -> _Broken:
    return _Broken(Fault(node.name, node.op_type, problem, "precision", hint))
