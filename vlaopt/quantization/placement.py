"""Where QuantizeLinear and DequantizeLinear nodes go: one plan, one placement per kind of backend.

Every placement quantizes the inputs of the plan's int8 layers, both of a product of two activations, and the skips of
residual blocks (`residuals`), and corrects biases where the plan has means. They differ in the rest:

`onnxruntime`: asymmetric uint8 activations, int32 biases, outputs quantized where `quantized_outputs` says. Only then
does ONNX Runtime compute in integers: measured, products with int32 biases ran twice as fast as with float ones, and
convolutions in front of HardSwish 2 to 4 times as fast as with float outputs.
`openvino`: uint8 for activations that are never negative, and asymmetric for those straight out of a MatMul; symmetric
int8 for the others, float biases and outputs. A pool takes codes: see `_pooled`.
`tensorrt`: symmetric int8 activations, float biases and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from vlaopt.backends import Placement
from vlaopt.errors import InputError, StageError
from vlaopt.graph.check import check
from vlaopt.graph.external import array
from vlaopt.graph.naming import tidy
from vlaopt.graph.topology import constants, consumers, tensor_names, unique
from vlaopt.graph.unused import drop_unused
from vlaopt.quantization.plan import ComponentPlan, WeightScales
from vlaopt.quantization.weights import (
    SMALLEST_SCALE,
    WEIGHT_LIMIT,
    Layer,
    Weight,
    layers,
    mean_error,
    quantize_weight,
    quantized_outputs,
    residuals,
)
from vlaopt.tensors import Array

_BIAS_LIMIT = 2.0**30
"""Largest code of an int32 bias, with room for the products that are added to it."""


def write_qdq(
    model: ModelProto,
    plan: ComponentPlan,
    data: bytes = b"",
    *,
    placement: Placement,
    weights: WeightScales = "per-channel",
    limit: int = WEIGHT_LIMIT,
) -> ModelProto:
    """The graph with the plan's `int8` and `int8-weights` nodes between Q/DQ nodes; its other nodes as they are.

    `model` is the FP32 graph that the plan was made for, `data` where the weights lie that are not in it. A tensor is
    quantized once however many nodes take it, weights to codes of at most `limit`. Raises StageError when the plan
    names a node that the graph lacks, or lacks the range of an activation.
    """
    return _Writer(model, data, plan, placement, weights, limit).write()


def activation_parameters(
    low: float, high: float, kind: Literal["uint8", "int8"], *, limit: int = WEIGHT_LIMIT
) -> tuple[Array, Array]:
    """Scale (float32) and zero point (`kind`) of an activation that covers [low, high], `low <= 0 <= high`.

    In int8 the largest code of what it covers is `limit`.
    """
    if kind == "int8":
        scale = np.float32(max(max(-low, high) / limit, SMALLEST_SCALE))
        return np.asarray(scale), np.asarray(np.int8(0))
    scale = np.float32(max((high - low) / 255.0, SMALLEST_SCALE))
    return np.asarray(scale), np.asarray(np.uint8(np.clip(np.rint(-low / np.float64(scale)), 0, 255)))


class _Writer:
    """One graph being written. Nodes are collected in `_nodes` in an order that stays topological."""

    def __init__(
        self,
        model: ModelProto,
        data: bytes,
        plan: ComponentPlan,
        placement: Placement,
        weights: WeightScales,
        limit: int,
    ) -> None:
        self._data = data
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._graph = self._model.graph
        self._plan = plan
        self._placement = placement
        self._per_channel = weights == "per-channel"
        self._limit = limit
        self._constants = constants(self._graph)
        self._taken = tensor_names(self._graph) | {node.name for node in self._graph.node}
        self._nodes: list[NodeProto] = []
        self._dequantized: dict[str, str] = {}
        self._weights: dict[tuple[str, int, bytes], tuple[str, Array]] = {}
        self._layers = _planned(model, plan)
        # OpenVINO 2026.4 has crashed while it compiled symmetric int8 behind a MatMul.
        self._multiplied = {node.output[0] for node in self._graph.node if node.op_type == "MatMul"}
        self._takers = {name: len(nodes) for name, nodes in consumers(self._graph).items()}
        self._uncorrected: dict[str, Array] = {}
        # The right one of two activations stands where weights stand, so it is as they are: int8, with as many bits.
        # ONNX Runtime multiplies uint8 by uint8 without saturating, on every CPU.
        self._weightlike = {layer.other for layer in self._layers.values() if layer.other}

    def write(self) -> ModelProto:
        chosen = [name for name in self._layers if self._plan.nodes[name].scheme == "int8"]
        outputs = quantized_outputs(self._graph, chosen) if self._placement == "onnxruntime" else set()
        wanted = outputs | {tensor for name in chosen for tensor in self._layers[name].activations}
        skips = self._skips(chosen, wanted)
        wanted |= set(skips.values())
        pooled = self._pooled(chosen, skips, wanted) if self._placement == "openvino" else set()
        wanted -= pooled
        for value in self._graph.input:
            self._quantize(value.name, wanted)
        for node in self._graph.node:
            written = NodeProto()
            written.CopyFrom(node)
            layer = self._layers.get(node.name)
            for at, name in enumerate(written.input):
                if name in outputs or name == skips.get(node.name):
                    written.input[at] = self._dequantized[name]
            if layer:
                self._rewire(written, layer)
            if node.op_type == "Add":
                self._correct(written)
            if node.output[0] in pooled:
                written.input[0] = self._quantized(node.input[0], node.output[0])
            self._nodes.append(written)
            for name in node.output:
                self._quantize(name, wanted)
        return finished(self._model, self._nodes, self._data)

    def _rewire(self, node: NodeProto, layer: Layer) -> None:
        scheme = self._plan.nodes[node.name].scheme
        if scheme == "int8":
            for at, tensor in enumerate(layer.activations):
                node.input[at] = self._dequantized[tensor]
            if not layer.weights:
                return
            scale_x, _ = self._parameters(str(layer.activation))
            bias = self._bias(node)
            # An int32 bias has the scale of the products: a channel of small weights must not push it out of int32.
            # This holds for a float bias too, as ONNX Runtime quantizes it while it opens the graph.
            floor = 0.0 if bias is None else np.abs(bias.astype(np.float64)) / (np.float64(scale_x) * _BIAS_LIMIT)
            node.input[1], scale_w = self._weight(layer.weights[0], floor)
            error = self._mean_error(layer, floor)
            if bias is None:
                self._uncorrected[node.output[0]] = error
                return
            corrected = (bias - error).astype(np.float32)
            if self._placement == "onnxruntime":
                node.input[2] = self._dequantized_bias(node.input[2], corrected, scale_x * scale_w)
            elif error.any():
                node.input[2] = self._constant(f"{node.input[2]}_corrected", corrected)
        elif scheme == "int8-weights":
            for weight in layer.weights:
                node.input[weight.position], _ = self._weight(weight, 0.0)

    def _mean_error(self, layer: Layer, floor: Array | float) -> Array:
        """What quantizing its weights adds to each output of a layer on average; zeros where nothing is corrected."""
        weight = layer.weights[0]
        values = array(self._constants[weight.tensor], self._data)
        if layer.activation not in self._plan.means:
            return np.zeros(values.shape[weight.axis])
        axis = weight.axis if self._per_channel else None
        floor = floor if self._per_channel else float(np.max(floor))
        codes, scale = quantize_weight(values, axis, floor, limit=self._limit)
        return mean_error(values, codes, scale, layer, np.asarray(self._plan.means[layer.activation]))

    def _correct(self, node: NodeProto) -> None:
        """Correct the constant that an Add brings to a product without a bias of its own."""
        for product, constant in ((0, 1), (1, 0)):
            error = self._uncorrected.get(node.input[product])
            tensor = self._constants.get(node.input[constant])
            if error is None or tensor is None or not error.any():
                continue
            values = array(tensor, self._data)
            if values.size == values.shape[-1] == error.size and self._takers[node.input[product]] == 1:
                corrected = (values - error.reshape(values.shape)).astype(np.float32)
                node.input[constant] = self._constant(f"{node.input[constant]}_corrected", corrected)

    def _quantize(self, tensor: str, wanted: set[str]) -> None:
        if tensor in wanted:
            self._dequantized[tensor] = self._quantized(tensor, tensor)

    def _quantized(self, tensor: str, ranged: str) -> str:
        """A tensor after Q and DQ by the range of `ranged`, which holds no other values."""
        scale, zero_point = self._parameters(ranged)
        parameters = [self._constant(f"{tensor}_scale", scale), self._constant(f"{tensor}_zero_point", zero_point)]
        codes = unique(f"{tensor}_quantized", self._taken)
        result = unique(f"{tensor}_dequantized", self._taken)
        self._add("QuantizeLinear", [tensor, *parameters], codes)
        self._add("DequantizeLinear", [codes, *parameters], result)
        return result

    def _pooled(self, chosen: list[str], skips: Mapping[str, str], wanted: set[str]) -> set[str]:
        """The outputs of MaxPool in `wanted` whose pool takes codes instead: the largest code is that of the largest.

        The same numbers, but convolution and pool then write and read a quarter of the bytes: 0.7 of 20 ms of ACT,
        measured on a CPU with AVX-512. Not where somebody takes what is pooled unquantized.
        """
        quantizing = {(name, tensor) for name in chosen for tensor in self._layers[name].activations} | {*skips.items()}
        takers = consumers(self._graph)
        found = {
            node.output[0]
            for node in self._graph.node
            if node.op_type == "MaxPool"
            and node.output[0] in wanted
            and {(taker.name, node.output[0]) for taker in takers[node.output[0]]} <= quantizing
        }
        self._dequantized |= {tensor: tensor for tensor in found}
        return found

    def _weight(self, weight: Weight, floor: Array | float) -> tuple[str, Array]:
        """The dequantized weight's tensor and its scales; one for all nodes that share it with equal scales."""
        values = array(self._constants[weight.tensor], self._data)
        axis = weight.axis if self._per_channel else None
        floor = floor if self._per_channel else float(np.max(floor))
        codes, scale = quantize_weight(values, axis, floor, limit=self._limit)
        key = (weight.tensor, weight.axis, scale.tobytes())
        if key not in self._weights:
            result = unique(f"{weight.tensor}_dequantized", self._taken)
            inputs = [
                self._constant(f"{weight.tensor}_quantized", codes),
                self._constant(f"{weight.tensor}_scale", scale),
                self._constant(f"{weight.tensor}_zero_point", np.zeros(scale.shape, dtype=np.int8)),
            ]
            self._add("DequantizeLinear", inputs, result, axis)
            self._weights[key] = result, scale
        return self._weights[key]

    def _bias(self, node: NodeProto) -> Array | None:
        """A constant bias with one value per output, which alone can be int32."""
        if len(node.input) < 3 or node.input[2] not in self._constants:
            return None
        values = array(self._constants[node.input[2]], self._data)
        weight = self._layers[node.name].weights[0]
        outputs = self._constants[weight.tensor].dims[weight.axis]
        return values if values.shape == (outputs,) else None

    def _dequantized_bias(self, tensor: str, bias: Array, scale: Array) -> str:
        scale = np.asarray(scale, dtype=np.float32)
        codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64)).astype(np.int32)
        result = unique(f"{tensor}_dequantized", self._taken)
        inputs = [self._constant(f"{tensor}_quantized", codes), self._constant(f"{tensor}_scale", scale)]
        self._add("DequantizeLinear", inputs, result, 0 if scale.ndim else None)
        return result

    def _skips(self, chosen: list[str], wanted: set[str]) -> dict[str, str]:
        """The tensor that every residual Add takes quantized: what is quantized anyway or comes out of a convolution,
        so that backends compute convolution, sum and Relu as one."""
        convolved = {self._layers[name].node.output[0] for name in chosen if self._layers[name].node.op_type == "Conv"}
        allowed = wanted | (convolved if self._placement == "tensorrt" else set())
        return {node: tensor for node, tensor in residuals(self._graph, chosen).items() if tensor in allowed}

    def _parameters(self, tensor: str) -> tuple[Array, Array]:
        low, high = self._range(tensor)
        if self._placement == "onnxruntime":
            return activation_parameters(low, high, "uint8")
        if tensor in self._weightlike:
            return activation_parameters(low, high, "int8", limit=self._limit)
        unsigned = self._placement == "openvino" and (low >= 0 or tensor in self._multiplied)
        return activation_parameters(low, high, "uint8" if unsigned else "int8")

    def _range(self, tensor: str) -> tuple[float, float]:
        if tensor not in self._plan.ranges:
            raise StageError(f"the plan has no range of {tensor!r}", hint="quantize again with a calibration set")
        return self._plan.ranges[tensor]

    def _constant(self, name: str, value: Array) -> str:
        name = unique(name, self._taken)
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, operator: str, inputs: list[str], output: str, axis: int | None = None) -> None:
        node = helper.make_node(operator, inputs, [output], name=unique(f"{output}/{operator}", self._taken))
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._nodes.append(node)


def finished(model: ModelProto, nodes: Iterable[NodeProto], data: bytes) -> ModelProto:
    """`model` with `nodes` in place of its own, without what they do not use, in canonical form.

    `nodes` may be its own. Raises StageError when that is not valid ONNX.
    """
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    drop_unused(model.graph)
    result = tidy(model)
    try:
        check(result, data, domains={node.domain for node in result.graph.node})
    except InputError as error:
        raise StageError(f"quantized into a graph that is {error.message}") from error
    return result


def _planned(model: ModelProto, plan: ComponentPlan) -> Mapping[str, Layer]:
    known = layers(model)
    strangers = [name for name in plan.nodes if name not in known]
    if strangers:
        raise StageError(
            f"the plan names {strangers[0]!r}, which the graph does not have as a layer with weights",
            hint="the plan was made for another graph: quantize again",
        )
    return {name: known[name] for name in plan.nodes}
