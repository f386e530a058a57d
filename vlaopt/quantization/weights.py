"""Which nodes can be 8-bit, with weights or of two activations, along which axis scales go, how much they compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from vlaopt.graph.external import light
from vlaopt.graph.topology import constants, consumers
from vlaopt.tensors import Array

MATRIX_OPERATORS = frozenset({"Conv", "Gemm", "MatMul"})
"""Their products can be computed in 8 bit."""

STORED_OPERATORS = frozenset({"Gather", "GRU", "LSTM", "RNN"})
"""Their weights can be stored in 8 bit; what they compute stays FP32."""

WEIGHT_LIMIT = 127
"""Symmetric: -128 has no opposite, and TensorRT's zero point is always 0."""

REDUCED_LIMIT = 64
"""Two products of a uint8 activation and such a weight still fit into int16: 2 · 255 · 64 < 2^15.

x86 CPUs without VNNI add products in pairs in int16 (VPMADDUBSW) and saturate: ONNX Runtime 1.31 and OpenVINO 2026.4
both gave products that were off by a tenth of their size with weights up to 127, and exact ones with weights up to 64.
"""

BLOCKS: Mapping[str, tuple[int, ...]] = {"int4-weights": (32, 16), "nvfp4": (16,)}
"""How many weights along a product's inputs may share a scale, the preferred number first. NVFP4 is defined with 16."""

SMALLEST_SCALE = 2.0**-40
"""A scale of 0 is not valid ONNX, and the product of two scales must be a normal float32."""


_ABSORBED = ("Relu", "Clip")
"""What a quantizer with a fitting range does anyway, so backends drop it."""


@dataclass(frozen=True)
class Weight:
    """One constant operand: its tensor, the input of the node that takes it, the axis of its scales, its shape."""

    tensor: str
    position: int
    axis: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A node with weights, or a MatMul of two activations as in attention, which has none.

    `activation` is the tensor it multiplies weights with, None for `STORED_OPERATORS`; of a product of two activations
    it is the left one and `other` the right one. `intensity` is multiply-adds per value read or written, 0 for
    `STORED_OPERATORS`; `obstacle` says why its product cannot be 8-bit.
    """

    node: NodeProto
    weights: tuple[Weight, ...]
    activation: str | None
    intensity: float
    obstacle: str | None
    other: str | None = None
    multiply_adds: float = 0.0
    """Of one run, as far as shapes are known; 0 for `STORED_OPERATORS`."""

    @property
    def activations(self) -> tuple[str, ...]:
        """What its product takes besides weights: a placement quantizes all of them or none."""
        return tuple(tensor for tensor in (self.activation, self.other) if tensor is not None)

    @property
    def channel_axis(self) -> int:
        """Along which axis of `activation` the channels lie that its weights multiply."""
        return 1 if self.node.op_type == "Conv" else -1


def layers(model: ModelProto) -> dict[str, Layer]:
    """Every node of the graph itself with constant float32 weights, and every MatMul of two activations, by name."""
    fixed = constants(model.graph)
    stored = {name: tuple(tensor.dims) for name, tensor in fixed.items() if tensor.data_type == TensorProto.FLOAT}
    shapes = _shapes(model.graph) | _shapes(onnx.shape_inference.infer_shapes(light(model)).graph) | stored
    weighted = (_layer(node, stored, shapes) for node in model.graph.node)
    products = (_product(node, shapes) for node in model.graph.node if not set(node.input) & set(fixed))
    found = {layer.node.name: layer for layer in (*weighted, *products) if layer}
    return {node.name: found[node.name] for node in model.graph.node if node.name in found}


def block_of(layer: Layer, scheme: str) -> int:
    """How many weights of a matrix product share a scale in a scheme of `BLOCKS`; 0 where it has no such form."""
    if layer.node.op_type not in ("Gemm", "MatMul") or not layer.weights or len(layer.weights[0].shape) != 2:
        return 0
    weight = layer.weights[0]
    return next((size for size in BLOCKS[scheme] if weight.shape[1 - weight.axis] % size == 0), 0)


def residuals(graph: GraphProto, nodes: Iterable[str]) -> dict[str, str]:
    """The skips of residual blocks: by name of the Add, the tensor it adds to the output of a convolution in `nodes`.

    Where both operands are such outputs the second is the skip, as networks write it. Sums behind matrix products are
    left alone: they carry the precise values of a transformer through all of its layers.
    """
    chosen = set(nodes)
    fixed = constants(graph)
    made = {node.output[0]: node for node in graph.node if node.op_type == "Conv" and node.name in chosen}
    found = {}
    for node in graph.node:
        if node.op_type != "Add" or set(node.input) & set(fixed):
            continue
        first, second = node.input
        if first in made:
            found[node.name] = second
        elif second in made:
            found[node.name] = first
    return found


def quantized_outputs(graph: GraphProto, nodes: Iterable[str]) -> set[str]:
    """The tensors that ONNX Runtime needs quantized, behind `nodes`, to compute these in integers; no graph outputs.

    A convolution always needs it, a Gemm in front of a Relu too: ONNX Runtime would join the two in FP32. The quantizer
    goes behind an activation that it absorbs.
    """
    takers = consumers(graph)
    given = {value.name for value in graph.output}
    chosen = set(nodes)
    found = set()
    for node in graph.node:
        if node.name not in chosen or node.op_type not in ("Conv", "Gemm") or node.output[0] in given:
            continue
        followers = takers.get(node.output[0], [])
        if len(followers) == 1 and followers[0].op_type in _ABSORBED:
            found.add(followers[0].output[0])
        elif node.op_type == "Conv":
            found.add(node.output[0])
    return found - given


def attribute(node: NodeProto, name: str, default: float) -> float:
    """A number in a node's attributes."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def weight_axes(node: NodeProto, rank: int) -> dict[int, int]:
    """The inputs of a node that can be 8-bit weights, of `rank` dimensions, each with the axis of its scales."""
    if node.op_type == "Gather":
        return {0: 0}
    if node.op_type in STORED_OPERATORS:
        return {1: 1, 2: 1}
    if node.op_type in MATRIX_OPERATORS:
        return {1: {"Conv": 0, "Gemm": 0 if attribute(node, "transB", 0) else 1, "MatMul": rank - 1}[node.op_type]}
    return {}


def _layer(
    node: NodeProto, stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> Layer | None:
    rank = len(stored.get(node.input[1], ())) if len(node.input) > 1 else 0
    axes = weight_axes(node, rank)
    weights = tuple(Weight(node.input[at], at, axis, stored.get(node.input[at], ())) for at, axis in axes.items())
    if not weights or any(weight.tensor not in stored for weight in weights):
        return None
    if node.op_type in STORED_OPERATORS:
        return Layer(node, weights, None, 0.0, None)
    done, moved = _work(node, weights[0], shapes)
    intensity = done / moved if moved else 0.0
    return Layer(node, weights, node.input[0], intensity, _obstacle(node, rank), multiply_adds=done)


def _product(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
    """A MatMul of two float32 tensors that the graph computes or takes, whose shapes are known."""
    if node.op_type != "MatMul" or any(name not in shapes for name in (*node.input, *node.output)):
        return None
    left, right = node.input
    moved = sum(math.prod(shapes[name]) for name in (left, right, node.output[0]))
    done = float(math.prod(shapes[node.output[0]]) * shapes[left][-1])
    obstacle = "it multiplies by a vector" if min(len(shapes[left]), len(shapes[right])) < 2 else None
    return Layer(node, (), left, done / moved, obstacle, other=right, multiply_adds=done)


def _work(node: NodeProto, weight: Weight, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, int]:
    """Multiply-adds, and values read and written; none of them where a shape is unknown."""
    read, written = shapes.get(node.input[0]), shapes.get(node.output[0])
    if not read or not written:
        return 0.0, 0
    kernel = shapes[weight.tensor]
    per_output = math.prod(kernel) / kernel[weight.axis]
    return per_output * math.prod(written), math.prod(read) + math.prod(written)


def _obstacle(node: NodeProto, rank: int) -> str | None:
    if node.op_type == "MatMul" and rank != 2:
        return f"its weights have {rank} dimensions, 8-bit products take 2"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its activation is transposed"
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
        return "it scales its product or its bias"
    return None


def _shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    values = (*graph.input, *graph.output, *graph.value_info)
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    return {name: shape for name, shape in shapes.items() if shape and all(shape)}


def mean_error(values: Array, codes: Array, scale: Array, layer: Layer, means: Array) -> Array:
    """What rounding the weights of `layer` to `codes` adds to each of its outputs on average: float64, [outputs].

    `means` are those of its activation's channels. A convolution's border counts like its inside. Source: Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2.
    """
    axis = layer.weights[0].axis
    shape = [-1 if at == axis else 1 for at in range(values.ndim)] if scale.ndim else []
    error = codes.astype(np.float64) * scale.astype(np.float64).reshape(shape) - values
    by_output = np.moveaxis(error, axis, 0)
    outputs, inputs = by_output.shape[:2]
    summed = by_output.reshape(outputs, inputs, -1).sum(axis=2)
    groups = means.size // inputs
    result: Array = np.einsum("goi,gi->go", summed.reshape(groups, -1, inputs), means.reshape(groups, inputs)).reshape(
        -1
    )
    return result


def quantize_weight(
    values: Array, axis: int | None, floor: Array | float = 0.0, *, limit: int = WEIGHT_LIMIT
) -> tuple[Array, Array]:
    """Symmetric int8 codes of `values`, and the float32 scales: one per index of `axis`, or one for all when None.

    The largest code is `limit`.
    No scale is below `floor` (one per index or one for all) or `SMALLEST_SCALE`, so a channel of zeros has one too.
    """
    others = tuple(at for at in range(values.ndim) if at != axis) if axis is not None else None
    amax = np.abs(values.astype(np.float64)).max(axis=others, initial=0.0)
    scale = np.maximum(np.maximum(amax / limit, floor), SMALLEST_SCALE).astype(np.float32)
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    codes = np.rint(values.astype(np.float64) / scale.astype(np.float64).reshape(shape))
    return np.clip(codes, -limit, limit).astype(np.int8), scale
