"""FP8, INT4 weights and NVFP4 weights as Q/DQ nodes of standard ONNX, for GPUs that have them.

FP8: products of FP8 activations and weights, e4m3, one scale per tensor and per output channel. INT4 and NVFP4: weights
alone, in blocks along the inputs of a product; they are dequantized to the floats that it computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from vlaopt.errors import StageError
from vlaopt.graph.external import array
from vlaopt.graph.opset import raised
from vlaopt.graph.topology import constants, tensor_names, unique
from vlaopt.quantization.placement import finished
from vlaopt.quantization.plan import ComponentPlan
from vlaopt.quantization.weights import BLOCKS, SMALLEST_SCALE, Layer, block_of, layers
from vlaopt.tensors import Array

OPSETS: Mapping[str, int] = {"fp8": 19, "int4-weights": 21, "nvfp4": 23}
"""The first opset whose Q/DQ nodes have the element type, and blocks where it needs them (ONNX's changelog)."""

FP8_LARGEST, INT4_LARGEST, FP4_LARGEST = 448.0, 7.0, 6.0
"""Of float8_e4m3fn, of symmetric int4 and of float4_e2m1 (OCP Microscaling Formats 1.0)."""

FP8_SMALLEST = 2.0**-9

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Fractions of a block's largest weight that its scale may cover: clipping one makes the steps smaller."""


def write_lowbit(model: ModelProto, plan: ComponentPlan, data: bytes = b"") -> ModelProto:
    """The graph with the plan's `fp8`, `int4-weights` and `nvfp4` nodes between Q/DQ nodes; its others as they are.

    `data` is where the weights lie that are not in `model`. The opset is raised to the first that has the types. Every
    scale of weights in blocks is a number that FP32, FP16 and BF16 all have. Raises StageError when the plan lacks the
    range of an activation or names a node that has no such form.
    """
    chosen = {name: node.scheme for name, node in plan.nodes.items() if node.scheme in OPSETS}
    if not chosen:
        return model
    model = raised(model, max(OPSETS[scheme] for scheme in chosen.values()))
    known = layers(model)
    for name in chosen:
        if name not in known or not _has_form(known[name], chosen[name]):
            raise StageError(f"the plan wants {chosen[name]} of {name!r}, which has no such form in this graph")
    writer = _Writer(model, plan, data)
    for node in model.graph.node:
        writer.node(node, known.get(node.name), chosen.get(node.name))
    return writer.finish()


def int4_blocks(values: Array, axis: int, block: int) -> tuple[Array, Array]:
    """Symmetric int4 codes of `values`, and float32 scales, one for every `block` along `axis`.

    Of a few scales for each block the one with the smallest squared error is taken.
    """
    parts = _blocks(values, axis, block)
    largest = np.abs(parts).max(axis=1, initial=0.0)
    best = np.full(largest.shape, np.inf)
    scale = np.zeros(largest.shape, np.float32)
    for shrink in _SHRINKS:
        candidate = shared_scale(largest * shrink / INT4_LARGEST)
        steps = np.clip(np.rint(parts / candidate[:, None]), -INT4_LARGEST, INT4_LARGEST)
        error = np.square(steps * candidate[:, None] - parts).sum(axis=1)
        scale, best = np.where(error < best, candidate, scale), np.minimum(error, best)
    codes = np.clip(np.rint(parts / scale[:, None]), -INT4_LARGEST, INT4_LARGEST)
    return _whole(codes, values.shape, axis).astype(ml_dtypes.int4), np.moveaxis(scale, 0, axis).astype(np.float32)


def nvfp4_blocks(values: Array, axis: int, block: int = 16) -> tuple[Array, Array, Array]:
    """float4_e2m1 codes of `values`, the FP8 scale of every block along `axis`, and the float32 scale over all.

    The scale over all is a power of two, which every float type has.
    """
    parts = _blocks(values, axis, block)
    largest = np.abs(parts).max(axis=1, initial=0.0)
    over_all = 2.0 ** np.clip(np.ceil(np.log2(max(largest.max() / (FP4_LARGEST * FP8_LARGEST), 2.0**-24))), -24, 15)
    scale = np.maximum(largest / FP4_LARGEST / over_all, FP8_SMALLEST).astype(ml_dtypes.float8_e4m3fn)
    exact = scale.astype(np.float64) * over_all
    codes = np.clip(parts / exact[:, None], -FP4_LARGEST, FP4_LARGEST)
    whole = _whole(codes, values.shape, axis).astype(ml_dtypes.float4_e2m1fn)
    return whole, np.moveaxis(scale, 0, axis), np.float32(over_all)


def shared_scale(scale: Array) -> Array:
    """The next float32 number from `scale` on that FP16 and BF16 have too, above 0. It has at most 8 binary digits."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        found = scale.astype(dtype)
        short = found.astype(np.float64) < scale
        scale = np.where(short, np.nextafter(found, dtype(np.inf)), found).astype(np.float64)
    return np.maximum(scale, 2.0**-24).astype(np.float32)


def _blocks(values: Array, axis: int, block: int) -> Array:
    """`values` in float64 as [blocks, block, others]."""
    moved = np.moveaxis(values.astype(np.float64), axis, 0)
    return moved.reshape(-1, block, *moved.shape[1:])


def _whole(parts: Array, shape: tuple[int, ...], axis: int) -> Array:
    """What `_blocks` cut, in one piece again."""
    moved = parts.reshape(-1, *parts.shape[2:])
    return np.ascontiguousarray(np.moveaxis(moved, 0, axis)).reshape(shape)


def _has_form(layer: Layer, scheme: str) -> bool:
    if scheme in BLOCKS:
        return block_of(layer, scheme) > 0
    return bool(layer.weights) and layer.activation is not None and not layer.obstacle


class _Writer:
    """One graph being written; a tensor is quantized once however many nodes take it."""

    def __init__(self, model: ModelProto, plan: ComponentPlan, data: bytes) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._plan, self._data = plan, data
        self._constants = constants(model.graph)
        self._taken = tensor_names(model.graph) | {node.name for node in model.graph.node}
        self._nodes: list[NodeProto] = []
        self._dequantized: dict[tuple[str, str, int], str] = {}

    def node(self, node: NodeProto, layer: Layer | None, scheme: str | None) -> None:
        """Take over a node, with its operands dequantized where a scheme is given."""
        written = NodeProto()
        written.CopyFrom(node)
        if scheme and layer:
            weight = layer.weights[0]
            if scheme == "fp8":
                written.input[0] = self._once(self._activation, node.input[0], "activation", 0)
                written.input[weight.position] = self._once(self._fp8, weight.tensor, scheme, weight.axis)
            else:
                write = self._int4 if scheme == "int4-weights" else self._nvfp4
                block = block_of(layer, scheme)
                written.input[weight.position] = self._once(
                    lambda tensor, axis: write(tensor, axis, block), weight.tensor, scheme, 1 - weight.axis
                )
        self._nodes.append(written)

    def finish(self) -> ModelProto:
        return finished(self._model, self._nodes, self._data)

    def _once(self, write: Callable[[str, int], str], tensor: str, scheme: str, axis: int) -> str:
        key = tensor, scheme, axis
        if key not in self._dequantized:
            self._dequantized[key] = write(tensor, axis)
        return self._dequantized[key]

    def _activation(self, tensor: str, axis: int) -> str:
        if tensor not in self._plan.ranges:
            raise StageError(f"the plan has no range of {tensor!r}", hint="quantize again with a calibration set")
        scale = np.float32(max(*np.abs(self._plan.ranges[tensor]), SMALLEST_SCALE * FP8_LARGEST) / FP8_LARGEST)
        parameters = [
            self._constant(f"{tensor}_scale", scale),
            self._constant(f"{tensor}_zero_point", np.zeros((), ml_dtypes.float8_e4m3fn)),
        ]
        codes = self._add("QuantizeLinear", [tensor, *parameters], f"{tensor}_fp8")
        return self._add("DequantizeLinear", [codes, *parameters], f"{tensor}_dequantized")

    def _fp8(self, tensor: str, axis: int) -> str:
        values = self._weights(tensor)
        others = tuple(at for at in range(values.ndim) if at != axis)
        largest = np.abs(values).max(axis=others, initial=0.0)
        scale = np.maximum(largest / FP8_LARGEST, SMALLEST_SCALE).astype(np.float32)
        shape = [-1 if at == axis else 1 for at in range(values.ndim)]
        codes = np.clip(values / scale.reshape(shape), -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn)
        inputs = [
            self._constant(f"{tensor}_fp8", codes),
            self._constant(f"{tensor}_scale", scale),
            self._constant(f"{tensor}_zero_point", np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)),
        ]
        return self._add("DequantizeLinear", inputs, f"{tensor}_dequantized", axis=axis)

    def _int4(self, tensor: str, axis: int, block: int) -> str:
        codes, scale = int4_blocks(self._weights(tensor), axis, block)
        inputs = [self._constant(f"{tensor}_int4", codes), self._constant(f"{tensor}_scale", scale)]
        return self._add("DequantizeLinear", inputs, f"{tensor}_dequantized", axis=axis, block_size=block)

    def _nvfp4(self, tensor: str, axis: int, block: int) -> str:
        codes, scale, over_all = nvfp4_blocks(self._weights(tensor), axis, block)
        inputs = [self._constant(f"{tensor}_scale_fp8", scale), self._constant(f"{tensor}_scale_over_all", over_all)]
        scales = self._add("DequantizeLinear", inputs, f"{tensor}_scale")
        inputs = [self._constant(f"{tensor}_fp4", codes), scales]
        return self._add("DequantizeLinear", inputs, f"{tensor}_dequantized", axis=axis, block_size=block)

    def _weights(self, tensor: str) -> Array:
        return array(self._constants[tensor], self._data).astype(np.float64)

    def _constant(self, name: str, value: Array) -> str:
        name = unique(name, self._taken)
        self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: int) -> str:
        result = unique(output, self._taken)
        name = unique(f"{result}/{operator}", self._taken)
        self._nodes.append(helper.make_node(operator, inputs, [result], name=name, **attributes))
        return result
