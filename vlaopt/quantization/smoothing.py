"""Scales moved out of activations with loud channels into weights, so that 8 bits hold both: SmoothQuant.

What a graph computes stays equal up to rounding: the node that makes an activation gives each channel divided by a
number, the products that take it have the rows of their weights multiplied by it. Source: Xiao et al., "SmoothQuant",
2022, equation 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from vlaopt.errors import StageError
from vlaopt.graph.external import is_outside
from vlaopt.graph.topology import consumers, producers, tensor_names, unique
from vlaopt.quantization.weights import Layer, attribute, layers
from vlaopt.tensors import Array

Smoothing = Mapping[str, tuple[float, ...]]
"""What each channel of an activation is divided by, by the activation."""


@dataclass(frozen=True)
class Site:
    """An activation that products alone take, and the constants, as nodes and positions, that make its channels."""

    made_of: tuple[tuple[NodeProto, int], ...]
    takers: tuple[Layer, ...]


def sites(model: ModelProto, products: Collection[str]) -> dict[str, Site]:
    """Where scales can move into `products`, the names of Gemm and MatMul nodes; by the activation.

    An activation must come out of a norm or a product, with a bias and ReLU or without, and `products` alone must take
    it. Weights outside of the model cannot be changed, so their activations are left out.
    """
    return _Sites(model).of(products)


def smoothing(model: ModelProto, found: Mapping[str, Site], amax: Smoothing, alpha: float) -> Smoothing:
    """The numbers for the sites found in `model`; `amax` has the largest |x| of each channel of their activations.

    `alpha` says how much of the difficulty goes to the weights: 0 makes all of their rows equally large, 1 all channels
    of the activation. A channel or row of zeros keeps its scale.
    """
    fixed = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = {}
    for tensor, site in found.items():
        loud = np.asarray(amax[tensor], dtype=np.float64)
        rows = np.max(
            [_rows(numpy_helper.to_array(fixed[taker.node.input[1]]), taker) for taker in site.takers], axis=0
        )
        usable = (loud > 0) & (rows > 0)
        scale = np.where(usable, loud, 1.0) ** alpha / np.where(usable, rows, 1.0) ** (1 - alpha)
        chosen[tensor] = tuple(float(value) for value in np.where(usable, scale, 1.0).astype(np.float32))
    return chosen


def smooth(model: ModelProto, by: Smoothing) -> ModelProto:
    """The graph with the scales in `by` moved into weights. Raises StageError when it has no such sites."""
    result = ModelProto()
    result.CopyFrom(model)
    known = sites(result, layers(result))
    writer = _Writer(result)
    for tensor, scale in by.items():
        if tensor not in known:
            raise StageError(
                f"the plan smooths {tensor!r}, where this graph has nothing to smooth", hint="quantize again"
            )
        for node, position in known[tensor].made_of:
            writer.multiply(node, position, 1.0 / np.asarray(scale), _output_axis(node))
        for taker in known[tensor].takers:
            writer.multiply(taker.node, 1, np.asarray(scale), 1 - taker.weights[0].axis)
    return result


class _Sites:
    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._weights = {
            tensor.name: tuple(tensor.dims)
            for tensor in graph.initializer
            if tensor.data_type == TensorProto.FLOAT and not is_outside(tensor)
        }
        self._made, self._takers = producers(graph), consumers(graph)
        self._given = {value.name for value in graph.output}
        self._layers = layers(model)

    def of(self, names: Collection[str]) -> dict[str, Site]:
        found = {}
        for tensor, takers in self._takers.items():
            products = [self._layers.get(taker.name) for taker in takers]
            wanted = [
                product
                for product in products
                if product
                and product.activation == tensor
                and product.node.op_type in ("Gemm", "MatMul")
                and not product.obstacle
                and len(product.weights) == 1
                and product.weights[0].tensor in self._weights
                and product.node.name in names
            ]
            if len(wanted) < len(takers) or tensor in self._given:
                continue
            inputs = self._weights[wanted[0].weights[0].tensor][1 - wanted[0].weights[0].axis]
            made_of = self._made_of(tensor, inputs)
            if made_of and len({node.input[at] for node, at in made_of}) == len(made_of):
                found[tensor] = Site(tuple(made_of), tuple(wanted))
        return found

    def _made_of(self, tensor: str, channels: int) -> list[tuple[NodeProto, int]]:
        """The constants that scale the channels of `tensor` when all of them are scaled; [] where it cannot be."""
        node = self._made.get(tensor)
        if node is None or tensor in self._given:
            return []
        fixed = [at for at, name in enumerate(node.input) if name in self._weights]
        alone = {at for at in fixed if self._weights[node.input[at]] == (channels,)}
        if node.op_type == "Relu":
            return self._behind(node.input[0], channels)
        if node.op_type == "LayerNormalization" and attribute(node, "axis", -1) == -1:
            wanted = [at for at in range(1, len(node.input)) if node.input[at]]
            return [(node, at) for at in wanted] if set(wanted) <= alone else []
        if node.op_type == "Gemm":
            wanted = [at for at in range(1, len(node.input)) if node.input[at]]
            whole = set(wanted) <= set(fixed) and set(wanted[1:]) <= alone
            return [(node, at) for at in wanted] if whole else []
        if node.op_type == "MatMul" and fixed == [1] and len(self._weights[node.input[1]]) == 2:
            return [(node, 1)]
        if node.op_type == "Mul" and len(fixed) == 1 and set(fixed) == alone:
            return [(node, fixed[0])]
        if node.op_type == "Add" and len(fixed) == 1 and set(fixed) == alone:
            behind = self._behind(node.input[1 - fixed[0]], channels)
            return [(node, fixed[0]), *behind] if behind else []
        return []

    def _behind(self, tensor: str, channels: int) -> list[tuple[NodeProto, int]]:
        return self._made_of(tensor, channels) if len(self._takers[tensor]) == 1 else []


class _Writer:
    """Changes constants of a graph; those that other nodes take as well stay beside their changed form."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._fixed = {tensor.name: tensor for tensor in model.graph.initializer}
        self._takers = consumers(model.graph)
        self._taken = tensor_names(model.graph)

    def multiply(self, node: NodeProto, position: int, by: Array, axis: int) -> None:
        name = node.input[position]
        values = numpy_helper.to_array(self._fixed[name])
        shape = [-1 if at == axis % values.ndim else 1 for at in range(values.ndim)]
        changed = numpy_helper.from_array((values * by.reshape(shape)).astype(np.float32), name)
        if len(self._takers[name]) > 1:
            self._takers[name] = [taker for taker in self._takers[name] if taker is not node]
            changed.name = node.input[position] = unique(f"{name}_smoothed", self._taken)
            self._takers[changed.name] = [node]
            self._graph.initializer.append(changed)
            self._fixed[changed.name] = self._graph.initializer[-1]
        else:
            self._fixed[name].CopyFrom(changed)


def _output_axis(node: NodeProto) -> int:
    """The axis of channels in the constants of a node of `Site.made_of`; biases and factors have one axis alone."""
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else -1


def _rows(weight: Array, taker: Layer) -> Array:
    """The largest |w| of every row of a product's weights: of what it multiplies one channel with."""
    largest: Array = np.abs(weight.astype(np.float64)).max(axis=taker.weights[0].axis)
    return largest
