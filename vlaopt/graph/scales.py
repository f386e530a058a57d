"""Pass: a product with one number is multiplied into the weights that make its operand, as of attention's 1/sqrt(d)."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from vlaopt.graph.external import is_outside
from vlaopt.graph.topology import consumers, producers, tensor_names, unique
from vlaopt.tensors import Array

_MOVING = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""They move values and change none."""


def fold_scales(model: ModelProto) -> ModelProto:
    """`model` itself, changed in place since a copy would hold every weight twice; the values differ by rounding.

    Folded where nothing else takes what lies between the weights and the product. Weights of which another node takes
    a copy as they were stay beside their scaled form. Weights outside of the model are not scaled.
    """
    fold = _Fold(model)
    for node in [entry for entry in model.graph.node if entry.op_type == "Mul"]:
        fold.node(node)
    return model


class _Fold:
    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._weights = {
            tensor.name: tensor
            for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT and not is_outside(tensor)
        }
        self._made, self._takers = producers(model.graph), consumers(model.graph)
        self._given = {value.name for value in model.graph.output}
        self._taken = tensor_names(model.graph)

    def node(self, node: NodeProto) -> None:
        """Fold one product, where it can be."""
        at = next((at for at, name in enumerate(node.input) if self._is_number(name)), None)
        if at is None or node.output[0] in self._given or len(node.input) != 2:
            return
        operand = node.input[1 - at]
        places = self._places(operand)
        if not places:
            return
        factor = numpy_helper.to_array(self._weights[node.input[at]]).reshape(())
        for holder, position in places:
            self._scale(holder, position, factor)
        for taker in self._takers.get(node.output[0], []):
            taker.input[:] = [operand if name == node.output[0] else name for name in taker.input]
        self._takers[operand] = self._takers.pop(node.output[0], [])
        self._graph.node.remove(node)

    def _is_number(self, name: str) -> bool:
        """One number that adds no dimension."""
        return name in self._weights and list(self._weights[name].dims) in ([], [1])

    def _places(self, tensor: str) -> list[tuple[NodeProto, int]]:
        """The constant inputs, as nodes and positions, that scale `tensor` when all of them are scaled; [] for none."""
        node = self._made.get(tensor)
        if node is None or len(self._takers.get(tensor, [])) != 1 or tensor in self._given:
            return []
        if node.op_type in _MOVING:
            return self._places(node.input[0])
        weights = [at for at, name in enumerate(node.input) if name in self._weights]
        if node.op_type in ("Conv", "Gemm"):
            places = [(node, at) for at in range(1, len(node.input)) if node.input[at]]
            return places if {at for _, at in places} <= set(weights) else []
        if node.op_type in ("MatMul", "Mul") and weights:
            return [(node, weights[0])]
        if node.op_type == "Add" and len(weights) == 1:
            behind = self._places(node.input[1 - weights[0]])
            return [(node, weights[0]), *behind] if behind else []
        return []

    def _scale(self, node: NodeProto, position: int, factor: Array) -> None:
        name = node.input[position]
        scaled = np.asarray(numpy_helper.to_array(self._weights[name]) * factor, dtype=np.float32)
        others = [taker for taker in self._takers[name] if taker is not node]
        if not others and list(node.input).count(name) == 1 and name not in self._given:
            self._weights[name].CopyFrom(numpy_helper.from_array(scaled, name))
            return
        fresh = unique(f"{name}_scaled", self._taken)
        self._graph.initializer.append(numpy_helper.from_array(scaled, fresh))
        self._weights[fresh] = self._graph.initializer[-1]
        self._takers[name], self._takers[fresh] = others, [node]
        node.input[position] = fresh
