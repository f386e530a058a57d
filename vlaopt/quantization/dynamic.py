"""Dynamic int8: ranges of activations are found while the graph runs. Standard ONNX only; for CPU backends.

Each product becomes DynamicQuantizeLinear, MatMulInteger, a cast and a product with both scales, the pattern that ONNX
Runtime fuses into one kernel. Recurrent cells have no standard dynamic form.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.errors import StageError
from vlaopt.graph.external import array
from vlaopt.graph.topology import constants, tensor_names, unique
from vlaopt.quantization.placement import finished
from vlaopt.quantization.plan import ComponentPlan, WeightScales
from vlaopt.quantization.weights import WEIGHT_LIMIT, Layer, attribute, layers, quantize_weight
from vlaopt.tensors import Array


def write_dynamic(
    model: ModelProto,
    plan: ComponentPlan,
    data: bytes = b"",
    *,
    weights: WeightScales = "per-channel",
    limit: int = WEIGHT_LIMIT,
) -> ModelProto:
    """The graph with the plan's `int8-dynamic` nodes in integers; its other nodes as they are.

    `data` is where the weights lie that are not in `model`. A tensor is quantized once however many nodes take it,
    weights to codes of at most `limit`. The integer product keeps its node's name. Raises StageError when the plan
    names a node that has no dynamic form.
    """
    known = layers(model)
    chosen = {name: known.get(name) for name in plan.named("int8-dynamic")}
    for name, layer in chosen.items():
        if layer is None or layer.activation is None or layer.obstacle or layer.node.op_type == "Conv":
            raise StageError(f"the plan wants dynamic int8 of {name!r}, which has no such form in this graph")
    writer = _Writer(model, data, weights, limit)
    for node in model.graph.node:
        layer = chosen.get(node.name)
        if layer:
            writer.product(layer)
        else:
            writer.keep(node)
    return writer.finish()


class _Writer:
    def __init__(self, model: ModelProto, data: bytes, weights: WeightScales, limit: int) -> None:
        self._data = data
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._constants = constants(model.graph)
        self._per_channel = weights == "per-channel"
        self._limit = limit
        self._taken = tensor_names(model.graph)
        self._names = {node.name for node in model.graph.node}
        self._nodes: list[NodeProto] = []
        self._quantized: dict[str, tuple[str, str, str]] = {}
        self._weights: dict[tuple[str, bool], tuple[str, str]] = {}

    def keep(self, node: NodeProto) -> None:
        self._nodes.append(node)

    def product(self, layer: Layer) -> None:
        """Replace a Gemm or MatMul by an integer product, scaled back, plus its bias."""
        node = layer.node
        codes, scale, zero_point = self._activation(node.input[0])
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        weight, weight_scale = self._weight(layer.weights[0].tensor, transposed)
        output = node.output[0]
        biased = node.op_type == "Gemm" and len(node.input) > 2 and bool(node.input[2])
        integers = self._add("MatMulInteger", [codes, weight, zero_point], f"{output}_integers", name=node.name)
        floats = self._add("Cast", [integers], f"{output}_floats", to=TensorProto.FLOAT)
        scales = self._add("Mul", [scale, weight_scale], f"{output}_scale")
        if not biased:
            self._add("Mul", [floats, scales], output, final=True)
            return
        scaled = self._add("Mul", [floats, scales], f"{output}_scaled")
        self._add("Add", [scaled, node.input[2]], output, final=True)

    def finish(self) -> ModelProto:
        return finished(self._model, self._nodes, self._data)

    def _activation(self, tensor: str) -> tuple[str, str, str]:
        if tensor not in self._quantized:
            parts = ("quantized", "scale", "zero_point")
            codes, scale, zero_point = (unique(f"{tensor}_{part}", self._taken) for part in parts)
            name = unique(f"{tensor}/DynamicQuantizeLinear", self._names)
            outputs = [codes, scale, zero_point]
            self._nodes.append(helper.make_node("DynamicQuantizeLinear", [tensor], outputs, name=name))
            self._quantized[tensor] = codes, scale, zero_point
        return self._quantized[tensor]

    def _weight(self, tensor: str, transposed: bool) -> tuple[str, str]:
        """Codes as MatMulInteger takes them, [inputs, outputs], and their scales, [outputs] or one."""
        key = tensor, transposed
        if key not in self._weights:
            values = array(self._constants[tensor], self._data)
            values = values.T if transposed else values
            codes, scale = quantize_weight(values, 1 if self._per_channel else None, limit=self._limit)
            names = self._constant(f"{tensor}_quantized", codes), self._constant(f"{tensor}_scale", scale)
            self._weights[key] = names
        return self._weights[key]

    def _constant(self, name: str, value: Array) -> str:
        name = unique(name, self._taken)
        self._model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _add(
        self,
        operator: str,
        inputs: list[str],
        output: str,
        *,
        name: str = "",
        to: int | None = None,
        final: bool = False,
    ) -> str:
        result = output if final else unique(output, self._taken)
        label = name or unique(f"{result}/{operator}", self._names)
        node = helper.make_node(operator, inputs, [result], name=label)
        if to is not None:
            node.attribute.append(helper.make_attribute("to", to))
        self._nodes.append(node)
        return result
