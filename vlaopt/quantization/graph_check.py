"""Would TensorRT take a component's final graph? Its rules first, then NVIDIA's own parser and builder.

What they refuse comes back as node, module of the policy, reason and the recipe lines that mend it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnx import ModelProto, NodeProto

from vlaopt import backends, isolated
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import component_path, data_path
from vlaopt.backends.tensorrt import rtx
from vlaopt.backends.tensorrt.building import Refusal
from vlaopt.errors import StageError
from vlaopt.files import read_file
from vlaopt.graph.external import decode
from vlaopt.graph.scopes import node_path
from vlaopt.graph.topology import consumers, producers, scope_of
from vlaopt.hashing import digest_file
from vlaopt.progress import Progress
from vlaopt.quantization.structure import QDQ, Fault, structural_fault
from vlaopt.quantization.tensorrt import tensorrt_faults
from vlaopt.target import Target

BUILDER = "tensorrt-rtx"
"""The backend that builds anywhere, and so judges graphs for GPUs and lanes that are not here."""

STANDS_IN = (((10, 0), "12.0"), ((8, 9), "8.9"), ((8, 0), "8.6"), ((7, 5), "7.5"))
"""By lowest compute capability: the one of RTX cards that has the same precisions.

The builder knows neither Jetsons nor data-centre cards. FP4 begins with 10.0, FP8 with 8.9, BF16 with 8.0, and what a
graph asks for is its precisions: Orin (8.7) is tried as 8.6, Hopper (9.0) as 8.9, Thor (11.0) as 12.0.
"""

SHOWN = 3
"""Faults of one graph that are told; the others are counted."""


def check_rules(component: str, graph: Graph) -> None:
    """Raise StageError for the faults of a component's graph that TensorRT's rules find."""
    model = decode(graph)
    broken = structural_fault(model, "tensorrt")
    if faults := [*([broken] if broken else []), *tensorrt_faults(model)]:
        raise _refused(component, model, faults, "breaks TensorRT's rules")


def check_builds(
    graphs: Mapping[str, Path], target: Target, profiles: Mapping[str, Sequence[int]], progress: Progress
) -> str:
    """Raise StageError for what NVIDIA's builder refuses of a policy's graphs, strongly typed; gives what was done.

    Not done where it is not installed, where it knows no card like the target's, and where it makes the engine anyway.
    `graphs` are files by component. Each is built in a process of its own, as a builder can crash; equal ones once.
    `profiles` are the recipe's, of dynamic dimensions.
    """
    if BUILDER in target.backends:
        return f"left to stage engine: {BUILDER} builds the engine itself"
    if reason := backends.get(BUILDER).missing():
        return f"not done: {reason}"
    capability, stands_in = capability_of(target)
    if stands_in is None:
        return f"not done: {BUILDER} knows no GPU like compute capability {capability}"
    known: set[tuple[str, ...]] = set()
    with progress.task("checking the graphs with NVIDIA's builder", len(graphs)) as task:
        for name, path in graphs.items():
            digests = tuple(digest_file(file)[1] for file in _files(path))
            if digests not in known:
                _check_build(name, path, stands_in, profiles)
                known.add(digests)
            task.advance()
    version = backends.get(BUILDER).version()
    like = "" if capability == stands_in else f", which has the precisions of {capability}"
    return (
        f"{BUILDER} {version} built {len(graphs)} of {len(graphs)} components for compute capability {stands_in}{like}"
    )


def capability_of(target: Target) -> tuple[str, str | None]:
    """The target's compute capability with the fewest precisions, and the one of an RTX card in its place, or None."""
    numbers = {sm: tuple(int(part) for part in sm.split(".")) for sm in target.compute_capabilities}
    lowest = min(numbers, key=lambda sm: numbers[sm])
    return lowest, next((card for least, card in STANDS_IN if numbers[lowest] >= least), None)


def refusals_of(
    tell: Callable[..., None], path: Path, capability: str, profiles: Mapping[str, Sequence[int]]
) -> tuple[Refusal, ...]:
    """What NVIDIA's builder refuses of the graph at `path`, for `vlaopt.isolated`."""
    return rtx.check(_read(path), capability, profiles)


def _check_build(component: str, path: Path, capability: str, profiles: Mapping[str, Sequence[int]]) -> None:
    what = f"the check of {component} by NVIDIA's builder"
    if refusals := isolated.run(refusals_of, path, capability, dict(profiles), what=what):
        faults = [
            Fault(
                entry.node, entry.operator, f"is refused: {entry.reason}" if entry.node else entry.reason, "precision"
            )
            for entry in refusals
        ]
        raise _refused(component, decode(_read(path)), faults, f"is not built by NVIDIA's builder ({BUILDER})")


def _files(path: Path) -> list[Path]:
    """The graph's file, and the one beside it that holds its weights where there is one."""
    beside = path.with_name(data_path(path.name))
    return [path, beside] if beside.is_file() else [path]


def _read(path: Path) -> Graph:
    model, *data = _files(path)
    return Graph(read_file(model), *((read_file(data[0]), data[0].name) if data else ()))


def _refused(component: str, model: ModelProto, faults: Sequence[Fault], problem: str) -> StageError:
    nodes = {node.name: node for node in model.graph.node}
    layers = {fault.node: _layer_of(model, nodes[fault.node]) if fault.node in nodes else None for fault in faults}
    told = [_told(component, fault, layers[fault.node]) for fault in faults[:SHOWN]]
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return StageError(
        f"{component} {problem}: {'; '.join([*told, *more])}",
        where=component_path(component),
        hint=_hint(component, faults, layers),
    )


def _told(component: str, fault: Fault, layer: NodeProto | None) -> str:
    if layer is None:
        return str(fault) if fault.node else fault.reason
    return f"{fault} (module {node_path(component, layer.name)})"


def _hint(component: str, faults: Sequence[Fault], layers: Mapping[str, NodeProto | None]) -> str:
    """Recipe lines for the places that faults name, and what the faults say themselves."""
    said = [fault.hint for fault in faults if fault.hint]
    known = [(fault, layer) for fault in faults if (layer := layers[fault.node]) is not None]
    scopes = [_scope(component, layer.name) for fault, layer in known if fault.cure == "precision"]
    if scopes:
        rules = ", ".join(f'{{scope: "{scope}", scheme: fp32}}' for scope in list(dict.fromkeys(scopes))[:SHOWN])
        said.append(f"keep the place in FP32, quantize.rules: [{rules}]")
    if len(scopes) < len(faults):
        said.append("write the module with other operators, or export with another export.opset")
    return "; ".join(dict.fromkeys(said))


def _scope(component: str, node: str) -> str:
    """What a rule calls the module of a node; the node itself where it belongs to no module."""
    return node_path(component, node) if scope_of(node) else f"{component}.{node}"


def _layer_of(model: ModelProto, node: NodeProto) -> NodeProto:
    """The node that computes: itself, or the first one behind a quantizer or cast, or else in front of it."""
    takers, made = consumers(model.graph), producers(model.graph)
    found, ahead = node, node
    while ahead.op_type in (*QDQ, "Cast") and (following := takers.get(ahead.output[0])):
        ahead = following[0]
    if ahead.op_type not in (*QDQ, "Cast"):
        return ahead
    while found.op_type in (*QDQ, "Cast") and found.input[0] in made:
        found = made[found.input[0]]
    return found
