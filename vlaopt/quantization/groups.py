"""Groups of nodes by the modules they came from, coarse to fine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlaopt.graph.scopes import node_path

Node = tuple[str, str]
"""A component and the name of a node in it."""


@dataclass(frozen=True)
class Group:
    """Nodes that share a module, and the scope by which a rule names them; or a run of such groups, "first … last"."""

    scope: str
    nodes: tuple[Node, ...]

    def split(self) -> list[Group]:
        """Its parts one module deeper, in the order of their nodes; only itself when it is a single node."""
        if len(self.nodes) == 1:
            return [self]
        depth = len(_common(self.nodes)) + 1
        parts: dict[tuple[str, ...], list[Node]] = {}
        for node in self.nodes:
            parts.setdefault(_path(node)[:depth], []).append(node)
        return [_group(nodes) for nodes in parts.values()]


def whole(nodes: Iterable[Node]) -> list[Group]:
    """The coarsest groups: one for each component."""
    parts: dict[str, list[Node]] = {}
    for component, node in nodes:
        parts.setdefault(component, []).append((component, node))
    return [_group(part) for part in parts.values()]


def grouped(nodes: Iterable[Node], most: int) -> list[Group]:
    """At most `most` groups, or one for each component where these are more: the largest are split first.

    One of more parts than there is room for is split into two runs of neighbours.
    """
    found = whole(nodes)
    settled: set[str] = set()
    while open_ := [group for group in found if len(group.nodes) > 1 and group.scope not in settled]:
        largest = max(open_, key=lambda group: len(group.nodes))
        parts = largest.split()
        if len(found) - 1 + len(parts) > most:
            parts = [_run(parts[: len(parts) // 2]), _run(parts[len(parts) // 2 :])]
        if len(found) - 1 + len(parts) > most:
            settled.add(largest.scope)
            continue
        at = found.index(largest)
        found[at : at + 1] = parts
    return found


def _run(parts: list[Group]) -> Group:
    if len(parts) == 1:
        return parts[0]
    nodes = tuple(node for part in parts for node in part.nodes)
    return Group(f"{parts[0].scope} … {parts[-1].scope}", nodes)


def _group(nodes: list[Node]) -> Group:
    if len(nodes) == 1:
        return Group(".".join(nodes[0]), tuple(nodes))
    return Group(".".join(_common(nodes)), tuple(nodes))


def _common(nodes: Iterable[Node]) -> tuple[str, ...]:
    """The modules that all nodes lie in."""
    paths = [_path(node)[:-1] for node in nodes]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return tuple(shared)


def _path(node: Node) -> tuple[str, ...]:
    return (*node_path(*node).split("."), f"/{node[1]}")
