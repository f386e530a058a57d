"""Reading a graph: who makes a tensor, who takes it, what is constant, and which module a node came from.

Node names say the module: `blocks.3.expand.0/Conv` is the convolution of module `blocks.3.expand.0`, and a node of the
component itself has no slash. Knows nothing of how graphs are changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

SEPARATOR = "/"


def scope_of(node: str) -> str:
    """The module path within a node's name; empty for a node of the component itself."""
    return node.rpartition(SEPARATOR)[0]


def node_name(scope: str, operator: str) -> str:
    """The name of a node of `operator` in the module `scope`."""
    return f"{scope}{SEPARATOR}{operator}" if scope else operator


def unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_2`, `name_3` … when it is taken; the result is added to `taken`."""
    chosen, count = name, 1
    while chosen in taken:
        count += 1
        chosen = f"{name}_{count}"
    taken.add(chosen)
    return chosen


def opset_of(model: ModelProto) -> int:
    """The opset of the default ONNX domain; 0 when the model imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that makes each tensor of this graph (not of its subgraphs)."""
    return {output: node for node in graph.node for output in node.output if output}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes of this graph that take each tensor, a node once; a node counts when only its subgraph takes it."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(_taken(node)):
            found.setdefault(name, []).append(node)
    return found


def constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Initializers and the tensors of `Constant` nodes, by the name their consumers use."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def tensor_names(graph: GraphProto) -> set[str]:
    """Every tensor name used in the graph itself."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    return names.union(*(set(node.input) | set(node.output) for node in graph.node)) - {""}


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every subgraph within its nodes."""
    yield graph
    for node in graph.node:
        for sub in subgraphs(node):
            yield from graphs(sub)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's own attributes, as of `If`, `Loop` and `Scan`."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _taken(node: NodeProto) -> Iterable[str]:
    yield from (name for name in node.input if name)
    for sub in subgraphs(node):
        for inner in sub.node:
            yield from _taken(inner)
