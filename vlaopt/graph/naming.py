"""Names that say the module a node came from, in an order and form that two writers of one graph agree on.

For graphs that were just made: they are changed in place, since a copy would hold every weight twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, ValueInfoProto

from vlaopt.graph.topology import graphs, node_name, subgraphs, tensor_names, unique

PRODUCER = "vlaopt"


def rename(model: ModelProto, scopes: Mapping[str, str]) -> ModelProto:
    """`model` itself, its nodes called `<scope>/<operator>`, their outputs after them, and nothing said of its writer.

    `scopes` holds the module path of every node by its present name. Graph inputs, graph outputs and initializers keep
    their names, except those that the exporter numbered (`val_12`): they become `constant`, `constant_2` …
    """
    model.producer_name, model.producer_version, model.doc_string = PRODUCER, "", ""
    graph = model.graph
    graph.name = PRODUCER
    taken = {value.name for value in (*graph.input, *graph.output)} | _inner_names(graph)
    tensors = _constant_names(graph, taken)
    kept = {value.name for value in (*graph.input, *graph.output)} | set(tensors)
    nodes: set[str] = set()
    for node in graph.node:
        node.name = unique(node_name(scopes.get(node.name, ""), node.op_type), nodes)
        for position, output in enumerate(node.output):
            if output and output not in kept:
                tensors[output] = unique(node.name if position == 0 else f"{node.name}.{position}", taken)
    _apply(graph, tensors)
    return tidy(model)


def tidy(model: ModelProto) -> ModelProto:
    """`model` itself in canonical form: no doc strings, no metadata, attributes and shapes of tensors by name."""
    del model.metadata_props[:]
    for graph in graphs(model.graph):
        graph.doc_string = ""
        for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            entry.doc_string = ""
            del entry.metadata_props[:]
        for node in graph.node:
            ordered = sorted(node.attribute, key=lambda attribute: attribute.name)
            del node.attribute[:]
            node.attribute.extend(ordered)
        shapes = sorted(graph.value_info, key=lambda value: value.name)
        del graph.value_info[:]
        graph.value_info.extend(shapes)
    return model


def _constant_names(graph: GraphProto, taken: set[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    numbered = []
    for tensor in graph.initializer:
        if tensor.name.startswith("val_") and tensor.name[4:].isdecimal() and tensor.name not in taken:
            numbered.append(tensor.name)
        else:
            names[tensor.name] = tensor.name
            taken.add(tensor.name)
    for name in numbered:
        names[name] = unique("constant", taken)
    return names


def _inner_names(graph: GraphProto) -> set[str]:
    """Names of subgraphs: they stay, so nothing outside may come to have them."""
    inner = [sub for node in graph.node for sub in subgraphs(node)]
    return set().union(*(tensor_names(part) for sub in inner for part in graphs(sub)))


def _apply(graph: GraphProto, tensors: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [tensors.get(name, name) for name in node.input]
        node.output[:] = [tensors.get(name, name) for name in node.output]
        for sub in subgraphs(node):
            _apply(sub, {name: new for name, new in tensors.items() if name not in _made(sub)})
    for tensor in graph.initializer:
        tensor.name = tensors.get(tensor.name, tensor.name)
    values: list[ValueInfoProto] = list(graph.value_info)
    for value in values:
        value.name = tensors.get(value.name, value.name)


def _made(graph: GraphProto) -> set[str]:
    """What a subgraph makes itself and so does not take from outside."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    return own | {output for node in graph.node for output in node.output}
