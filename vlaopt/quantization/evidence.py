"""What the FP32 graphs compute on recorded observations, held against a plan: outliers, saturation, other data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions
from vlaopt.graph.external import array, decode
from vlaopt.graph.topology import constants, consumers
from vlaopt.progress import Progress, track
from vlaopt.quantization.collect import showing
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.quantization.weights import MATRIX_OPERATORS, weight_axes
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import assemble
from vlaopt.tensors import Array

Kind = Literal["other data", "outlier channel", "saturation", "rounding"]

OUTLIER = 16.0
"""A channel that reaches this many times as far as the median one leaves the others 8 of 128 codes."""
BEYOND, CLIPPED = 0.02, 1e-4
"""Shares of values beyond a range: what no calibrator cuts off of the data it saw, and what one may."""
EXCESS, UNUSED = 0.1, 0.25
"""How far beyond a range values reach, and how much of it they use, as shares of its width."""

_ABSORBED = ("Relu", "Clip", "Add")


@dataclass(frozen=True)
class Cause:
    """Why a node loses precision, and the numbers that say so."""

    kind: Kind
    told: str


@dataclass
class Seen:
    """The values of one tensor in all calls. `channels` is the largest |x| of each of its channels."""

    low: float = 0.0
    high: float = 0.0
    values: int = 0
    beyond: int = 0
    channels: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, value: Array, planned: tuple[float, float], axis: int) -> None:
        """The values of one call; those outside `planned` are counted."""
        self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))
        self.values += value.size
        self.beyond += int(np.count_nonzero((value < planned[0]) | (value > planned[1])))
        others = tuple(at for at in range(value.ndim) if at != axis % max(value.ndim, 1))
        channels = np.abs(value).max(axis=others)
        self.channels = np.maximum(self.channels, channels) if self.channels.size else np.atleast_1d(channels)


@dataclass(frozen=True)
class Observed:
    """The FP32 policy on golden data: its `actions`, float32 [samples, chunk, action_dim], and tensors of a plan.

    `tensors` are by component and name.
    """

    actions: Array
    tensors: Mapping[str, Mapping[str, Seen]]

    def ranges(self, component: str) -> dict[str, tuple[float, float]]:
        """The range of each tensor on these observations."""
        return {name: (seen.low, seen.high) for name, seen in self.tensors[component].items()}


def observe(
    source: Artifact, graphs: Mapping[str, Graph], plan: QuantizationPlan, golden: Golden, progress: Progress
) -> Observed:
    """Run the FP32 graphs on `golden`, every component at every step of the loop; one sample in memory at a time."""
    library, options = backends.get("onnxruntime"), EngineOptions(threads=1)
    planned = {name: plan.components[name].ranges for name in graphs if name in plan.components}
    watchers = {name: showing(graphs[name], list(ranges)) for name, ranges in planned.items() if ranges}
    axes = {name: _axes(decode(graphs[name]).graph) for name in watchers}
    tensors = {name: {tensor: Seen() for tensor in ranges} for name, ranges in planned.items()}

    def tap(name: str, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        if name not in watchers:
            return
        values = {**inputs, **watchers[name].run(inputs)}
        for tensor, seen in tensors[name].items():
            seen.add(values[tensor], planned[name][tensor], axes[name].get(tensor, -1))

    sessions = {name: library.open(library.build(graph, options).files, options) for name, graph in graphs.items()}
    policy = assemble(source, sessions, backend=library.name)
    watched = track(progress, "watching the FP32 policy", golden.samples, len(golden.samples))
    actions = [policy.predict_chunk(observation, noise, tap=tap) for observation, noise in watched]
    return Observed(np.stack(actions), tensors)


def causes(
    graph: Graph, nodes: Sequence[str], planned: Mapping[str, tuple[float, float]], seen: Mapping[str, Seen]
) -> tuple[Cause, ...]:
    """Why `nodes` of a component lose precision, the likeliest first; `rounding` when nothing else is seen."""
    model = decode(graph)
    chosen = [node for node in model.graph.node if node.name in set(nodes)]
    found = [cause for node in chosen for cause in _causes(model, graph.data, node, planned, seen)]
    order: tuple[Kind, ...] = ("other data", "outlier channel", "saturation")
    unique = dict.fromkeys(sorted(found, key=lambda cause: order.index(cause.kind)))
    return tuple(unique) or (Cause("rounding", "no outlier and nothing cut off: 8 bits are too coarse for its values"),)


def _causes(
    model: ModelProto,
    data: bytes,
    node: NodeProto,
    planned: Mapping[str, tuple[float, float]],
    seen: Mapping[str, Seen],
) -> Iterator[Cause]:
    for tensor in _quantized_around(model.graph, node, planned):
        if tensor in seen and seen[tensor].values:
            yield from _of_tensor(tensor, planned[tensor], seen[tensor])
    known = constants(model.graph)
    weight = known.get(node.input[1]) if node.op_type in MATRIX_OPERATORS else None
    if weight is not None:
        axis = weight_axes(node, len(weight.dims))[1]
        # By input channel: those that share a scale with others, even where every output channel has its own.
        others = tuple(at for at in range(len(weight.dims)) if at != (1 if axis == 0 else len(weight.dims) - 2))
        yield from _outlier(
            f"input channel {{}} of weight {node.input[1]}", np.abs(array(weight, data)).max(axis=others)
        )


def _of_tensor(tensor: str, planned: tuple[float, float], seen: Seen) -> Iterator[Cause]:
    low, high = planned
    width = max(high - low, float(np.finfo(np.float32).tiny))
    share, excess = seen.beyond / seen.values, max(seen.high - high, low - seen.low) / width
    used = (seen.high - seen.low) / width
    if share > BEYOND and excess > EXCESS:
        told = f"{share:.0%} of {tensor} lie beyond the range that was calibrated, by up to {excess:.0%} of its width"
        yield Cause("other data", told)
    elif share > CLIPPED and excess > EXCESS:
        yield Cause("saturation", f"{share:.2%} of {tensor} are cut off, by up to {excess:.0%} of its range's width")
    elif used < UNUSED:
        told = f"{tensor} uses {used:.0%} of the range that was calibrated: most of its codes are never used"
        yield Cause("other data", told)
    yield from _outlier(f"channel {{}} of {tensor}", seen.channels)


def _outlier(name: str, channels: Array) -> Iterator[Cause]:
    """`name` has a place for the number of the channel."""
    alive = channels[channels > 0]
    usual = float(np.median(alive)) if alive.size > 1 else 0.0
    largest = int(channels.argmax()) if channels.size else 0
    if usual and channels[largest] > OUTLIER * usual:
        told = (
            f"{name.format(largest)} reaches {channels[largest]:.3g}, {channels[largest] / usual:.0f} times the usual"
        )
        yield Cause("outlier channel", told)


def _quantized_around(graph: GraphProto, node: NodeProto, planned: Mapping[str, object]) -> list[str]:
    """The tensors with a range that are quantized because of a node: in front of it, behind it or its activation."""
    behind = [follower for output in node.output for follower in consumers(graph).get(output, [])]
    absorbed = [output for follower in behind if follower.op_type in _ABSORBED for output in follower.output]
    return [name for name in dict.fromkeys((*node.input, *node.output, *absorbed)) if name in planned]


def _axes(graph: GraphProto) -> dict[str, int]:
    """The axis of channels of tensors around convolutions; that of others is the last."""
    of_convolutions = [node for node in graph.node if node.op_type == "Conv"]
    found = {name: 1 for node in of_convolutions for name in (node.input[0], node.output[0])}
    for node in graph.node:
        if node.op_type in _ABSORBED and node.input[0] in found:
            found[node.output[0]] = 1
    return found
