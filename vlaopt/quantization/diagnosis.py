"""Where a quantized policy loses its actions: the guilty nodes, why, and recipe lines that mend it, each one measured.

Nodes are toggled between the plan's precision and FP32, from components to single nodes, so that backends fuse as they
do in the engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from vlaopt.benchmark.actions import ActionError
from vlaopt.graph.external import decode, encode
from vlaopt.graph.scopes import covers_node, node_path
from vlaopt.progress import Progress, Task
from vlaopt.quantization.case import Case
from vlaopt.quantization.evidence import Cause, Observed, causes, observe
from vlaopt.quantization.smoothing import sites, smooth, smoothing
from vlaopt.quantization.trials import Trials
from vlaopt.runtime.golden import Golden

EVALUATIONS = 48
"""Trials that locating may take, unless told otherwise."""
NAMED = 6
"""Guilty parts that are named, each with its causes and two trials."""
SHARE = 0.05
"""A part that alone gives less than this share of the whole loss is not looked into."""
FAN_OUT = 8
"""Parts that one is cut into at most."""

ALPHA = 0.5
"""How far loud channels are moved into weights in a trial: the SmoothQuant paper's own choice."""

Held = Callable[[ActionError], bool]
"""Whether an action error is within the limits of a recipe."""


@dataclass(frozen=True)
class Guilty:
    """Nodes of a component that lose precision: one, or several where the trials did not suffice to tell them apart.

    Mean action errors against FP32: `alone` with only them as planned, `without` with only them in FP32.
    """

    component: str
    nodes: tuple[str, ...]
    scope: str
    alone: float
    without: float
    causes: tuple[Cause, ...]


@dataclass(frozen=True)
class Mend:
    """Recipe lines, and the action error against the reference that a trial found them to leave."""

    lines: str
    why: str
    error: ActionError
    held: bool


@dataclass(frozen=True)
class Diagnosis:
    """`error` and `fp32` are action errors against the reference: of the plan, and of the FP32 graphs.

    `loss` is the mean action error of the plan against FP32, which the guilty share; `evaluations` counts trials.
    """

    backend: str
    observed_on: str
    samples: int
    evaluations: int
    layers: int
    error: ActionError
    held: bool
    fp32: ActionError
    loss: float
    guilty: tuple[Guilty, ...]
    mends: tuple[Mend, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def diagnose(
    case: Case,
    golden: Golden,
    observed_on: str,
    held: Held,
    progress: Progress,
    *,
    backend: str = "onnxruntime",
    evaluations: int = EVALUATIONS,
) -> Diagnosis:
    """Find what loses precision on `golden`, and why. Raises EnvironmentProblem where `backend` cannot run here.

    Two sets of trials: those against the FP32 graphs' own actions tell what quantization loses, however far FP32 itself
    is off; those against the reference tell what the gates would say.
    """
    seen = observe(case.source, case.graphs, case.plan, golden, progress)
    against_fp32 = case.trials(replace(golden, actions=seen.actions), backend)
    against_reference = case.trials(golden, backend)
    every = case.quantized()
    loss = against_fp32.error(every).executed.mean
    with progress.task("locating the loss", evaluations) as task:
        parts, count = _locate(against_fp32, every, loss, evaluations, task)
    guilty = []
    with progress.task("weighing the guilty", len(parts)) as task:
        for alone, component, nodes in parts:
            without = against_fp32.error(_less(every, component, nodes)).executed.mean
            plan = case.plan.components[component]
            why = causes(case.graphs[component], nodes, plan.ranges, seen.tensors[component])
            guilty.append(Guilty(component, nodes, _scope(component, nodes), alone, without, why))
            task.advance()
    whole = against_reference.error(every)
    with progress.task("measuring mends"):
        mends = _mends(case, golden, seen, guilty, every, against_reference, held, backend)
    return Diagnosis(
        backend=backend,
        observed_on=observed_on,
        samples=len(golden.observations),
        evaluations=count + len(parts),
        layers=sum(map(len, every.values())),
        error=whole,
        held=held(whole),
        fp32=against_reference.error({}),
        loss=loss,
        guilty=tuple(guilty),
        mends=tuple(mends),
    )


def worst(case: Case, golden: Mapping[str, Golden], backend: str) -> str:
    """The label of the data on which the plan is furthest off."""
    every = case.quantized()
    if len(golden) == 1:
        return next(iter(golden))
    return max(golden, key=lambda label: case.trials(golden[label], backend).error(every).executed.mean)


Part = tuple[float, str, tuple[str, ...]]
"""The mean action error with only these nodes as planned, their component, and they."""


def _locate(
    trials: Trials, every: Mapping[str, tuple[str, ...]], loss: float, evaluations: int, task: Task
) -> tuple[list[Part], int]:
    """The parts that lose most by themselves, and how many trials it took; the worst part is looked into first."""
    count = 0

    def weighed(component: str, nodes: tuple[str, ...]) -> Part:
        nonlocal count
        count += 1
        task.advance()
        return trials.error({component: nodes}).executed.mean, component, nodes

    least = SHARE * loss
    parts = [weighed(component, nodes) for component, nodes in every.items()]
    heap = [(-part[0], position, part) for position, part in enumerate(parts)]
    heapq.heapify(heap)
    named: list[Part] = []
    while heap:
        _, position, part = heapq.heappop(heap)
        alone, component, nodes = part
        if alone < least or alone == 0.0:
            break
        pieces = split(nodes)
        if len(nodes) == 1 or count + len(pieces) > evaluations:
            named.append(part)
            continue
        for piece in pieces:
            position = len(parts)
            parts.append(weighed(component, piece))
            heapq.heappush(heap, (-parts[-1][0], position, parts[-1]))
    return sorted(named, key=lambda part: -part[0])[:NAMED], count


def split(nodes: Sequence[str]) -> list[tuple[str, ...]]:
    """Two to `FAN_OUT` parts of several nodes: by the next module of their paths, or halves where those are more."""
    if len(nodes) < 2:
        return [tuple(nodes)]
    paths = {node: node.replace("/", ".").split(".") for node in nodes}
    shared = 0
    while len({tuple(path[: shared + 1]) for path in paths.values()}) == 1:
        shared += 1
    groups = [tuple(group) for _, group in groupby(nodes, key=lambda node: paths[node][shared : shared + 1])]
    if 1 < len(groups) <= FAN_OUT:
        return groups
    middle = len(nodes) // 2
    return [tuple(nodes[:middle]), tuple(nodes[middle:])]


def _less(every: Mapping[str, tuple[str, ...]], component: str, nodes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`every` without `nodes` of a component."""
    gone = set(nodes)
    return {**every, component: tuple(node for node in every[component] if node not in gone)}


def _scope(component: str, nodes: Sequence[str]) -> str:
    """What to call nodes: the path of one, the module that several share."""
    paths = [node_path(component, node).split(".") for node in nodes]
    shared = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    return ".".join(shared) or component


def rules(every: Mapping[str, Sequence[str]], guilty: Sequence[Guilty]) -> list[str]:
    """Scopes that cover the guilty nodes and no other node that is quantized."""
    wanted = [(part.component, node) for part in guilty for node in part.nodes]
    others = [(name, node) for name, nodes in every.items() for node in nodes if (name, node) not in wanted]

    def clean(scope: str) -> bool:
        return not any(covers_node(scope, *other) for other in others)

    found = []
    for part in guilty:
        if clean(part.scope):
            found.append(part.scope)
            continue
        for node in part.nodes:
            path = node_path(part.component, node)
            found.append(path if clean(path) else f"{part.component}.{node}")
    return list(dict.fromkeys(found))


def _mends(
    case: Case,
    golden: Golden,
    seen: Observed,
    guilty: Sequence[Guilty],
    every: Mapping[str, tuple[str, ...]],
    trials: Trials,
    held: Held,
    backend: str,
) -> list[Mend]:
    found = []
    kinds = {cause.kind for part in guilty for cause in part.causes}
    if kinds & {"other data", "saturation"}:
        wider = case.plan.model_copy(
            update={
                "components": {
                    name: component.model_copy(update={"ranges": {**component.ranges, **seen.ranges(name)}})
                    for name, component in case.plan.components.items()
                }
            }
        )
        error = case.trials(golden, backend, wider).error(every)
        if error.executed.mean < trials.error(every).executed.mean:
            found.append(_recalibrated("other data" in kinds, error, held(error)))
    if "outlier channel" in kinds and not any(component.smoothing for component in case.plan.components.values()):
        error = _smoothed(case, seen).trials(golden, backend).error(every)
        if error.executed.mean < trials.error(every).executed.mean:
            why = "move loud channels into weights (SmoothQuant); measured with the ranges of these observations"
            found.append(Mend(f"quantize:\n  smooth: {ALPHA}", why, error, held(error)))
    if guilty:
        found.append(_in_fp32(every, guilty, trials, held))
    return found


def _smoothed(case: Case, seen: Observed) -> Case:
    """The case with loud channels moved into weights wherever they can be, their activations' ranges with them."""
    graphs, components = dict(case.graphs), dict(case.plan.components)
    for name, component in case.plan.components.items():
        graph = case.graphs[name]
        model = decode(graph)
        found = sites(model, component.named("int8"))
        channels = {tensor: tuple(map(float, seen.tensors[name][tensor].channels)) for tensor in found}
        moved = smoothing(model, found, channels, ALPHA)
        if moved:
            graphs[name] = encode(smooth(model, moved), name, graph.data)
            ranges, means = dict(component.ranges), dict(component.means)
            for tensor, scale in moved.items():
                if tensor in means:
                    means[tensor] = tuple(map(float, np.divide(means[tensor], scale)))
                end = float(np.max(np.divide(channels[tensor], scale)))
                ranges[tensor] = (-end if ranges[tensor][0] < 0 else 0.0, end)
            changed = {"graph_digest": graphs[name].digest, "ranges": ranges, "means": means}
            components[name] = component.model_copy(update=changed)
    plan = case.plan.model_copy(update={"components": components})
    return replace(case, graphs=graphs, plan=plan)


def _recalibrated(other_data: bool, error: ActionError, kept: bool) -> Mend:
    if other_data:
        lines = "calibration:\n  path: SET   # recorded where the policy works, from the same cameras"
        why = "calibrate on data like these observations (vlaopt calibration make, vlaopt capture)"
    else:
        lines, why = "quantize:\n  calibrator: minmax", "cut nothing off"
    return Mend(lines, f"{why}; measured with the ranges of these observations", error, kept)


def _in_fp32(every: Mapping[str, tuple[str, ...]], guilty: Sequence[Guilty], trials: Trials, held: Held) -> Mend:
    """As few of the guilty in FP32 as bring the error within the limits; or halve it, where it is already."""
    before = trials.error(every)
    floor = trials.error({}).executed.mean
    wanted = floor + (before.executed.mean - floor) / 2 if held(before) else None
    left: dict[str, tuple[str, ...]] = dict(every)
    raised: list[Guilty] = []
    error = before
    for part in sorted(guilty, key=lambda part: part.without):
        left = _less(left, part.component, part.nodes)
        raised.append(part)
        error = trials.error(left)
        if held(error) if wanted is None else error.executed.mean <= wanted:
            break
    scopes = [f'    - {{scope: "{scope}", scheme: fp32}}' for scope in rules(every, raised)]
    lines = "\n".join(["quantize:", "  rules:", *scopes])
    return Mend(lines, "compute these in FP32; put the rules behind those there are", error, held(error))
