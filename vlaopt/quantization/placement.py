"""Where QuantizeLinear and DequantizeLinear nodes go: one plan, one placement per kind of backend.

`uint8`, for ONNX Runtime and OpenVINO on a CPU: asymmetric uint8 activations, int32 biases, and outputs that are
quantized where `quantized_outputs` says. Only then does ONNX Runtime compute in integers: measured, products with int32
biases ran twice as fast as with float ones, and convolutions in front of HardSwish 2 to 4 times as fast as with float
outputs; OpenVINO is as fast either way. `int8`, for TensorRT: symmetric int8 activations in front of each layer, float
biases and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from vlaopt.errors import InputError, StageError
from vlaopt.graph.check import check
from vlaopt.graph.external import array
from vlaopt.graph.naming import tidy
from vlaopt.graph.topology import constants, consumers, tensor_names, unique
from vlaopt.quantization.plan import ComponentPlan, WeightScales
from vlaopt.quantization.weights import (
    SMALLEST_SCALE,
    WEIGHT_LIMIT,
    Layer,
    Weight,
    layers,
    quantize_weight,
    quantized_outputs,
)
from vlaopt.tensors import Array

Activations = Literal["uint8", "int8"]

_BIAS_LIMIT = 2.0**30
"""Largest code of an int32 bias, with room for the products that are added to it."""


def write_qdq(
    model: ModelProto,
    plan: ComponentPlan,
    data: bytes = b"",
    *,
    activations: Activations,
    weights: WeightScales = "per-channel",
    limit: int = WEIGHT_LIMIT,
) -> ModelProto:
    """The graph with the plan's `int8` and `int8-weights` nodes between Q/DQ nodes; its other nodes as they are.

    `model` is the FP32 graph that the plan was made for, `data` where the weights lie that are not in it. A tensor is
    quantized once however many nodes take it, weights to codes of at most `limit`. Raises StageError when the plan
    names a node that the graph lacks, or lacks the range of an activation.
    """
    return _Writer(model, data, plan, activations, weights, limit).write()


def activation_parameters(low: float, high: float, activations: Activations) -> tuple[Array, Array]:
    """Scale (float32) and zero point (uint8 or int8) of an activation that covers [low, high], `low <= 0 <= high`."""
    if activations == "int8":
        scale = np.float32(max(max(-low, high) / 127.0, SMALLEST_SCALE))
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
        activations: Activations,
        weights: WeightScales,
        limit: int,
    ) -> None:
        self._data = data
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._graph = self._model.graph
        self._plan = plan
        self._activations = activations
        self._per_channel = weights == "per-channel"
        self._limit = limit
        self._constants = constants(self._graph)
        self._taken = tensor_names(self._graph) | {node.name for node in self._graph.node}
        self._nodes: list[NodeProto] = []
        self._dequantized: dict[str, str] = {}
        self._weights: dict[tuple[str, int, bytes], tuple[str, Array]] = {}
        self._layers = _planned(model, plan)

    def write(self) -> ModelProto:
        chosen = [name for name in self._layers if self._plan.nodes[name].scheme == "int8"]
        outputs = quantized_outputs(self._graph, chosen) if self._activations == "uint8" else set()
        wanted = outputs | {str(self._layers[name].activation) for name in chosen}
        for value in self._graph.input:
            self._quantize(value.name, wanted)
        for node in self._graph.node:
            written = NodeProto()
            written.CopyFrom(node)
            layer = self._layers.get(node.name)
            for at, name in enumerate(written.input):
                if name in outputs:
                    written.input[at] = self._dequantized[name]
            if layer:
                self._rewire(written, layer)
            self._nodes.append(written)
            for name in node.output:
                self._quantize(name, wanted)
        return self._finish()

    def _rewire(self, node: NodeProto, layer: Layer) -> None:
        scheme = self._plan.nodes[node.name].scheme
        if scheme == "int8":
            activation = str(layer.activation)
            node.input[0] = self._dequantized[activation]
            scale_x, _ = activation_parameters(*self._range(activation), self._activations)
            bias = self._bias(node)
            # An int32 bias has the scale of the products: a channel of small weights must not push it out of int32.
            # This holds for a float bias too, as ONNX Runtime quantizes it while it opens the graph.
            floor = 0.0 if bias is None else np.abs(bias.astype(np.float64)) / (np.float64(scale_x) * _BIAS_LIMIT)
            node.input[1], scale_w = self._weight(layer.weights[0], floor)
            if bias is not None and self._activations == "uint8":
                node.input[2] = self._dequantized_bias(node.input[2], bias, scale_x * scale_w)
        elif scheme == "int8-weights":
            for weight in layer.weights:
                node.input[weight.position], _ = self._weight(weight, 0.0)

    def _quantize(self, tensor: str, wanted: set[str]) -> None:
        if tensor not in wanted:
            return
        scale, zero_point = activation_parameters(*self._range(tensor), self._activations)
        parameters = [self._constant(f"{tensor}_scale", scale), self._constant(f"{tensor}_zero_point", zero_point)]
        codes = unique(f"{tensor}_quantized", self._taken)
        result = unique(f"{tensor}_dequantized", self._taken)
        self._add("QuantizeLinear", [tensor, *parameters], codes)
        self._add("DequantizeLinear", [codes, *parameters], result)
        self._dequantized[tensor] = result

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

    def _finish(self) -> ModelProto:
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        drop_unused(self._graph)
        return checked(self._model, self._data)


def drop_unused(graph: GraphProto) -> None:
    """Remove, in place, the initializers and shapes of tensors that nothing in `graph` takes or makes any more."""
    used = set(consumers(graph)) | {value.name for value in graph.output}
    made = used.union(*(set(node.output) for node in graph.node))
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    shapes = [value for value in graph.value_info if value.name in made]
    for field, kept in ((graph.initializer, initializers), (graph.value_info, shapes)):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del field[:]
        field.extend(copies)


def checked(model: ModelProto, data: bytes) -> ModelProto:
    """`model` itself in canonical form. Raises StageError when it is not valid ONNX."""
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
