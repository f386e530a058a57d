"""Which nodes a scope of a recipe means: `component.module.path`, or for one node `component.module.path/Operator`."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vlaopt import scopes
from vlaopt.graph.topology import scope_of


def node_path(component: str, node: str) -> str:
    """The module path of a node of a component: `vision.stem.0`, or `vision` for a node of the component itself."""
    scope = scope_of(node)
    return f"{component}.{scope}" if scope else component


def covers_node(glob: str, component: str, node: str) -> bool:
    """Whether the glob matches the node, its module, or a module above it."""
    return fnmatchcase(f"{component}.{node}", glob) or scopes.covers(glob, node_path(component, node))
