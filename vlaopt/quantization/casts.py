"""A graph with FP16 and BF16 written in: casts between the types, constants and scales in the type that takes them;
or marks, for a backend that takes no casts.

Every tensor keeps its name in FP32; its other form has the type in its name. Why not onnxruntime.transformers.float16
(1.31): it has no BF16, and moves weights that overflow to 65504 with a line for debuggers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.artifact.graph import MARK
from vlaopt.graph.external import array
from vlaopt.graph.opset import raised
from vlaopt.graph.topology import constants, consumers, opset_of, subgraphs, tensor_names, unique
from vlaopt.quantization.halves import BF16_OPSET, FP16_SMALLEST_NORMAL, HALVES, element_types, half_operands
from vlaopt.quantization.placement import finished
from vlaopt.quantization.plan import NodePlan
from vlaopt.quantization.weights import WEIGHT_LIMIT
from vlaopt.tensors import Array

_FLOAT = int(TensorProto.FLOAT)
_DTYPES = {int(TensorProto.FLOAT16): np.dtype(np.float16), int(TensorProto.BFLOAT16): np.dtype(ml_dtypes.bfloat16)}
_SUFFIX = {number: name for name, number in HALVES.items()} | {_FLOAT: "fp32"}


def write_casts(model: ModelProto, floats: Mapping[str, NodePlan], data: bytes = b"") -> ModelProto:
    """The graph with the nodes of `floats` in the type that it says; inputs and outputs of the graph stay FP32.

    `model` is FP32 with or without Q/DQ nodes, `data` where the weights lie that are not in it. Q/DQ nodes take the
    type of what surrounds them, and so do their scales, which int8 weights are coded anew for where FP16 has only part
    of the digits. A node that `floats` does not name stays FP32. Raises StageError when the result is not valid ONNX.
    """
    kinds = {HALVES[plan.scheme] for plan in floats.values() if plan.scheme in HALVES}
    if not kinds:
        return model
    if TensorProto.BFLOAT16 in kinds:
        model = raised(model, BF16_OPSET)
    return _Writer(model, floats, data).write()


def mark(model: ModelProto, floats: Mapping[str, NodePlan]) -> ModelProto:
    """`model` itself, FP32 as it is, the nodes of `floats` marked with the half that they are to compute in.

    For OpenVINO, which types its layers itself and fuses nothing across casts.
    """
    for node in model.graph.node:
        if node.name in floats and floats[node.name].scheme in HALVES:
            node.metadata_props.add(key=MARK, value=floats[node.name].scheme)
    return model


class _Writer:
    """One graph being written. Nodes are collected in `_nodes` in an order that stays topological."""

    def __init__(self, model: ModelProto, floats: Mapping[str, NodePlan], data: bytes) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._graph: GraphProto = self._model.graph
        self._floats, self._data, self._opset = floats, data, opset_of(model)
        self._kinds = element_types(model)
        self._constants = constants(self._graph)
        self._taken = tensor_names(self._graph)
        self._names = {node.name for node in self._graph.node}
        self._nodes: list[NodeProto] = []
        self._forms: dict[tuple[str, int], str] = {(value.name, _FLOAT): value.name for value in self._graph.input}
        self._forms |= {(name, _FLOAT): name for name in self._constants}
        self._dequantizers: dict[str, NodeProto] = {}
        self._scales: dict[tuple[str, int], str] = {}

    def write(self) -> ModelProto:
        given = {value.name for value in self._graph.output}
        takers = consumers(self._graph)
        for node in self._graph.node:
            if node.op_type == "DequantizeLinear":
                self._dequantizers[node.output[0]] = node
                continue
            if node.op_type == "QuantizeLinear":
                self._quantize(node, takers)
            else:
                self._node(node)
            for name in given & set(node.output) & set(self._kinds):
                if self._kinds[name] == _FLOAT:
                    self._form(name, _FLOAT)
        for name in given & set(self._dequantizers):
            self._form(name, _FLOAT)
        return finished(self._model, self._nodes, self._data)

    def _node(self, node: NodeProto) -> None:
        scheme = self._floats[node.name].scheme if node.name in self._floats else "fp32"
        half = HALVES.get(scheme, _FLOAT)
        operands = half_operands(node, self._kinds, self._opset, scheme) if half != _FLOAT else None
        written = NodeProto()
        written.CopyFrom(node)
        for at, name in enumerate(node.input):
            if self._kinds.get(name) == _FLOAT:
                written.input[at] = self._form(name, half if operands and at in operands.inputs else _FLOAT)
        for name in (name for sub in subgraphs(node) for name in tensor_names(sub)):
            if name in self._dequantizers or (name, _FLOAT) in self._forms or self._made(name):
                self._form(name, _FLOAT)
        for at, name in enumerate(node.output):
            if name and operands and at in operands.outputs:
                written.output[at] = self._named(name, half)
            elif name:
                self._forms[name, _FLOAT] = name
        self._nodes.append(written)

    def _quantize(self, node: NodeProto, takers: Mapping[str, list[NodeProto]]) -> None:
        """A quantizer takes its tensor in the type that it was made in, so that no cast comes before it."""
        written = NodeProto()
        written.CopyFrom(node)
        kind = next((kind for kind in HALVES.values() if self._made(node.input[0], kind)), _FLOAT)
        written.input[0] = self._form(node.input[0], kind)
        written.input[1] = self._scale(node.input[1], kind)
        self._nodes.append(written)

    def _made(self, name: str, kind: int | None = None) -> bool:
        return any((name, one) in self._forms for one in ([kind] if kind else HALVES.values()))

    def _form(self, name: str, kind: int) -> str:
        """The tensor in a type, cast or dequantized to it where it is not there yet."""
        if (name, kind) not in self._forms:
            if name in self._dequantizers:
                self._dequantize(self._dequantizers[name], kind)
            elif name in self._constants:
                value = _finite_stays(array(self._constants[name], self._data), _DTYPES[kind])
                self._forms[name, kind] = self._constant(f"{name}_{_SUFFIX[kind]}", value)
            else:
                source = next(
                    self._forms[name, one] for one in (_FLOAT, *HALVES.values()) if (name, one) in self._forms
                )
                self._add(helper.make_node("Cast", [source], [self._named(name, kind)], to=kind))
        return self._forms[name, kind]

    def _named(self, name: str, kind: int) -> str:
        """The name of a tensor's form; from now on it counts as there."""
        result = name if kind == _FLOAT else unique(f"{name}_{_SUFFIX[kind]}", self._taken)
        self._forms[name, kind] = result
        return result

    def _dequantize(self, node: NodeProto, kind: int) -> None:
        written = NodeProto()
        written.CopyFrom(node)
        codes, scale = node.input[:2]
        if kind != _FLOAT and scale in self._constants and codes in self._constants:
            written.input[0] = self._codes(codes, scale, kind, node)
        written.input[1] = self._scale(scale, kind)
        written.output[0] = self._named(node.output[0], kind)
        if kind != _FLOAT:
            written.name = f"{node.name}_{_SUFFIX[kind]}"
        self._nodes.append(written)

    def _scale(self, name: str, kind: int) -> str:
        """A scale in a type. One that is computed itself, as NVFP4's are, is cast or dequantized like any tensor."""
        if kind == _FLOAT or name not in self._constants:
            return self._form(name, kind)
        if (name, kind) not in self._scales:
            value = rounded_scale(array(self._constants[name], self._data), kind)
            self._scales[name, kind] = self._constant(f"{name}_{_SUFFIX[kind]}", value)
        return self._scales[name, kind]

    def _codes(self, codes: str, scale: str, kind: int, node: NodeProto) -> str:
        """The codes of a constant for its scale in another type: the same ones, unless that type cuts the scale short.

        Only int8 is coded anew; scales of fewer bits are made such that every type holds them.
        """
        tensor = self._constants[codes]
        if tensor.data_type != TensorProto.INT8:
            return codes
        exact = array(self._constants[scale], self._data).astype(np.float64)
        ratio = exact / rounded_scale(exact, kind).astype(np.float64)
        values = array(tensor, self._data)
        if ratio.ndim:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            ratio = ratio.reshape([-1 if at == axis else 1 for at in range(values.ndim)])
        anew = np.clip(np.rint(values * ratio), -WEIGHT_LIMIT, WEIGHT_LIMIT).astype(np.int8)
        if (anew == values).all():
            return codes
        return self._constant(f"{codes}_{_SUFFIX[kind]}", anew)

    def _constant(self, name: str, value: Array) -> str:
        name = unique(name, self._taken)
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, node: NodeProto) -> None:
        node.name = unique(f"{node.output[0]}/{node.op_type}", self._names)
        self._nodes.append(node)


def _finite_stays(values: Array, dtype: np.dtype[Any]) -> Array:
    """`values` in a type, where its largest number stands for finite ones that would round to infinity.

    Masks of FP32's lowest number do in BF16, and softmax over a row of infinities is NaN.
    """
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return np.where(np.isfinite(values), np.clip(values, -largest, largest), values).astype(dtype)


def rounded_scale(scale: Array, kind: int) -> Array:
    """A scale in FP16 or BF16, never 0, and not below the true one where FP16 has only part of the digits."""
    dtype = _DTYPES[kind]
    result = np.asarray(scale).astype(dtype)
    if dtype == np.float16:
        short = (result.astype(np.float64) < scale) & (np.asarray(scale) < FP16_SMALLEST_NORMAL)
        result = np.where(short, np.nextafter(result, np.float16(np.inf)), result)
    return np.asarray(result, dtype=dtype)
