"""What a rewrite leaves behind that nothing takes any more."""

from __future__ import annotations

from onnx import GraphProto

from vlaopt.graph.topology import consumers


def drop_unused(graph: GraphProto) -> None:
    """Remove, in place, the initializers and shapes of tensors that nothing in `graph` takes or makes any more."""
    used = set(consumers(graph)) | {value.name for value in graph.output}
    made = used.union(*(set(node.output) for node in graph.node))
    for field, kept in ((graph.initializer, used), (graph.value_info, made)):
        for at in reversed(range(len(field))):  # entries are not copied: they may be large
            if field[at].name not in kept:
                del field[at]
