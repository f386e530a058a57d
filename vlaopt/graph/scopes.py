"""Which nodes a glob of a recipe means: `component.module.path`, or for one node `component.module.path/Operator`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from vlaopt.graph.topology import scope_of


def node_path(component: str, node: str) -> str:
    """The module path of a node of a component: `vision.stem.0`, or `vision` for a node of the component itself."""
    scope = scope_of(node)
    return f"{component}.{scope}" if scope else component


def covers(glob: str, component: str, node: str) -> bool:
    """Whether the glob matches the node, its module, or a module above it. `*` crosses dots."""
    parts = node_path(component, node).split(".")
    modules = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return fnmatchcase(f"{component}.{node}", glob) or any(fnmatchcase(module, glob) for module in modules)


def nearest(glob: str, paths: Iterable[str]) -> str | None:
    """The path, or the module above one, whose name is most like the glob's; None when there are no paths."""
    candidates: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        candidates.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    near = difflib.get_close_matches(glob.rstrip(".*"), list(candidates), n=1, cutoff=0.0)
    return near[0] if near else None
