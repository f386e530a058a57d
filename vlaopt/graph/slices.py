"""Pass: slices of a tensor that are concatenated again, one behind the other, become one slice or the tensor itself.

Loops over a sequence export so: LeRobot's ACT takes its 300 image tokens one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlaopt.graph.topology import constants, consumers, tensor_names, unique


@dataclass(frozen=True)
class _Piece:
    """What `node` slices: `tensor[start:end]` along `axis` of `shape`."""

    node: NodeProto
    tensor: str
    shape: tuple[int, ...]
    axis: int
    start: int
    end: int


def join_slices(model: ModelProto) -> ModelProto:
    """`model` itself, changed in place since a copy would hold every weight twice; what it computes stays equal."""
    graph = model.graph
    pieces = _pieces(graph)
    taken = tensor_names(graph) | {node.name for node in graph.node}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Concat":
            node.input[:] = [run if isinstance(run, str) else _joined(run, nodes, taken) for run in _runs(node, pieces)]
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    used = set(consumers(graph)) | {value.name for value in graph.output}
    for node in [entry for entry in graph.node if entry.op_type == "Slice" and entry.output[0] not in used]:
        graph.node.remove(node)
    return model


def _runs(concat: NodeProto, pieces: Mapping[str, _Piece]) -> list[str | list[_Piece]]:
    """The inputs of `concat`, those that go on where the one before ends taken together."""
    axis = next(entry.i for entry in concat.attribute if entry.name == "axis")
    runs: list[str | list[_Piece]] = []
    for name in concat.input:
        piece = pieces.get(name)
        if piece is None or piece.axis != axis % len(piece.shape):
            runs.append(name)
            continue
        last = runs[-1] if runs else ""
        if isinstance(last, list) and (last[-1].tensor, last[-1].end) == (piece.tensor, piece.start):
            last.append(piece)
        else:
            runs.append([piece])
    return runs


def _joined(run: list[_Piece], nodes: list[NodeProto], taken: set[str]) -> str:
    """The tensor that `run` is together; a slice that makes it is added to `nodes`."""
    first, last = run[0], run[-1]
    if len(run) == 1:
        return str(first.node.output[0])
    if (first.start, last.end) == (0, first.shape[first.axis]):
        return first.tensor
    output = unique(first.node.output[0], taken)
    operands = [first.tensor, first.node.input[1], last.node.input[2], *first.node.input[3:]]
    nodes.append(helper.make_node("Slice", operands, [output], name=unique(first.node.name, taken)))
    return output


def _pieces(graph: GraphProto) -> dict[str, _Piece]:
    """Every slice of step 1 along one axis of a known shape, its bounds constant, by its output."""
    fixed = constants(graph)
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info)
    }
    found = {}
    for node in graph.node:
        shape = shapes.get(node.input[0], ()) if node.op_type == "Slice" else ()
        numbers = [_number(fixed.get(name)) for name in node.input[1:]] if shape else []
        if len(numbers) < 3 or None in numbers or numbers[3:] not in ([], [1]):
            continue
        start, end, axis = (int(number or 0) for number in numbers[:3])
        size = shape[axis]
        start, end = (min(bound + size if bound < 0 else bound, size) for bound in (start, end))
        if 0 <= start < end:
            found[node.output[0]] = _Piece(node, node.input[0], shape, axis % len(shape), start, end)
    return found


def _number(tensor: TensorProto | None) -> int | None:
    values = numpy_helper.to_array(tensor) if tensor is not None else None
    return int(values.item()) if values is not None and values.size == 1 else None
