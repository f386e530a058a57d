"""Ranges of a graph's tensors: run the FP32 graph on calibration data and show what it computes to a calibrator."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto

from vlaopt.artifact.graph import Graph
from vlaopt.backends import check_feeds
from vlaopt.backends.onnxruntime import OnnxRuntimeSession, inference_session
from vlaopt.errors import InputError, StageError
from vlaopt.graph.external import decode, light
from vlaopt.optional import require
from vlaopt.progress import Progress, track
from vlaopt.quantization.calibrators import Calibrator, Extremes, Found, Histogram, Range, Steps, find
from vlaopt.tensors import Array

T = TypeVar("T")
Feeds = Callable[[], Iterable[tuple[str, Mapping[str, Array]]]]
"""Gives the component's inputs call by call, each with its sample's label; a sample's next call is its next loop step.

Asked once per pass, the same each time.
"""

OUTLIER = 1e6
"""A sample whose largest |x| is this many times that of the usual sample would leave one code to all the others."""


def collect_ranges(
    graph: Graph, feeds: Feeds, tensors: Sequence[str], calibrator: Calibrator, progress: Progress
) -> dict[str, Range]:
    """The range alone of what `collect` finds, loop steps calibrated together."""
    collected = collect(graph, feeds, tensors, calibrator, progress)
    return {name: of_tensor.range for name, of_tensor in collected.items()}


def collect(
    graph: Graph,
    feeds: Feeds,
    tensors: Sequence[str],
    calibrator: Calibrator,
    progress: Progress,
    steps: Steps = "together",
) -> dict[str, Found]:
    """What calibration finds of every tensor in `tensors` (float inputs and intermediate values of `graph`), by name.

    Two passes over `feeds`, one call at a time, in FP32 on one thread, so that neither the batch size nor the order
    of the samples nor the machine's cores changes a range. Memory is 32 kB per tensor, and per loop step where each is
    calibrated by itself. Raises InputError when there is no sample, when a tensor takes a value that is not finite or
    is an outlier by `OUTLIER` (naming tensor and sample), and when the second pass shows other data than the first;
    StageError when `graph` has no such tensor or does not run.
    """
    if not tensors:
        return {}
    session = showing(graph, tensors)
    extremes, calls = _find_extremes(_values(session, feeds, tensors, progress, "finding extremes"), tensors)
    together = {name: Histogram(reduce(Extremes.joined, extremes[name])) for name in tensors}
    each = {name: [Histogram(step) for step in extremes[name]] if steps != "together" else [] for name in tensors}
    seen: Counter[int] = Counter()
    for sample, step, values in _values(session, feeds, tensors, progress, "counting values"):
        seen[step] += 1
        for name, value in values.items():
            _placed(together[name].add, value, name, sample, step)
            if step < len(each[name]):
                _placed(each[name][step].add, value, name, sample, step)
    if seen != calls:
        counts = f"{calls.total()} calls in the first pass, {seen.total()} in the second"
        raise InputError(f"the calibration data changed: {counts}")
    return {name: find(calibrator, together[name], extremes[name], each[name], steps) for name in tensors}


def showing(graph: Graph, tensors: Sequence[str]) -> OnnxRuntimeSession:
    """A session of the FP32 graph on one thread that also gives `tensors`, but for those that are its own inputs."""
    return _open(_with_outputs(graph, tensors))


def channel_means(
    graph: Graph, feeds: Feeds, axes: Mapping[str, int], progress: Progress
) -> dict[str, tuple[float, ...]]:
    """The mean of every channel of the tensors in `axes`, which says along which axis their channels lie.

    One pass over `feeds`, every call of equal weight. Raises as `collect` does.
    """
    sums: dict[str, Array] = {}
    calls = 0
    for channels in _by_channel(graph, feeds, axes, progress, "averaging channels"):
        calls += 1
        for name, values in channels.items():
            means = values.mean(axis=1, dtype=np.float64)
            sums[name] = sums[name] + means if name in sums else means
    return {name: tuple(float(mean) for mean in (total / calls).astype(np.float32)) for name, total in sums.items()}


def channel_maxima(
    graph: Graph, feeds: Feeds, axes: Mapping[str, int], progress: Progress
) -> dict[str, tuple[float, ...]]:
    """The largest |x| of every channel of the tensors in `axes`, as `channel_means`."""
    found: dict[str, Array] = {}
    for channels in _by_channel(graph, feeds, axes, progress, "looking for loud channels"):
        for name, values in channels.items():
            largest = np.abs(values).max(axis=1)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return {name: tuple(float(most) for most in largest) for name, largest in found.items()}


def _by_channel(
    graph: Graph, feeds: Feeds, axes: Mapping[str, int], progress: Progress, label: str
) -> Iterator[dict[str, Array]]:
    """The values of every call, [channels, values]."""
    if not axes:
        return
    session = _open(_with_outputs(graph, list(axes)))
    for _, _, values in _values(session, feeds, list(axes), progress, label):
        moved = {name: np.moveaxis(value, axes[name], 0) for name, value in values.items()}
        yield {name: value.reshape(len(value), -1) for name, value in moved.items()}


def _find_extremes(
    passing: Iterator[tuple[str, int, dict[str, Array]]], tensors: Sequence[str]
) -> tuple[dict[str, list[Extremes]], Counter[int]]:
    """By tensor, the extremes of each loop step; and how many calls of each step there were."""
    extremes: dict[str, list[Extremes]] = {name: [] for name in tensors}
    largest = {name: array("d") for name in tensors}
    samples: list[str] = []
    calls: Counter[int] = Counter()
    for sample, step, values in passing:
        samples.append(_label(sample, step))
        calls[step] += 1
        for name, value in values.items():
            of_call = _placed(Extremes.of, value, name, sample, step)
            largest[name].append(of_call.amax)
            if step == len(extremes[name]):
                extremes[name].append(Extremes())
            extremes[name][step] = extremes[name][step].joined(of_call)
    if not samples:
        raise InputError("no calibration samples", hint="name a calibration set with samples (calibration.path)")
    for name, values_of in largest.items():
        usual = statistics.median(values_of)
        if usual > 0.0 and max(values_of) > OUTLIER * usual:
            raise InputError(
                f"calibration sample {samples[values_of.index(max(values_of))]} is an outlier: tensor {name!r} reaches "
                f"{max(values_of):.3g}, usually {usual:.3g}",
                hint="remove the sample: it would leave the others hardly any of the 256 codes",
            )
    return extremes, calls


def _placed(take: Callable[[Array], T], value: Array, name: str, sample: str, step: int) -> T:
    try:
        return take(value)
    except InputError as error:
        where = f"tensor {name!r}, calibration sample {_label(sample, step)}"
        raise InputError(f"{where}: {error.message}", hint=error.hint) from error


def _label(sample: str, step: int) -> str:
    return f"{sample}, step {step}" if step else sample


def _values(
    session: OnnxRuntimeSession, feeds: Feeds, tensors: Sequence[str], progress: Progress, label: str
) -> Iterator[tuple[str, int, dict[str, Array]]]:
    """Sample, loop step and values of every call."""
    for sample, calls in groupby(track(progress, label, feeds()), key=itemgetter(0)):
        for step, (_, feed) in enumerate(calls):
            check_feeds(session.inputs, feed)
            computed = session.run(feed)
            yield sample, step, {name: computed[name] if name in computed else feed[name] for name in tensors}


def _with_outputs(graph: Graph, tensors: Sequence[str]) -> Graph:
    """The graph that also gives `tensors`, except its own inputs."""
    model = decode(graph)
    inferred = onnx.shape_inference.infer_shapes(light(model), strict_mode=True)
    shapes = {value.name: value for value in inferred.graph.value_info}
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name in tensors:
        if name in known:
            continue
        if name not in shapes:
            raise StageError(f"the graph has no tensor {name!r} to find a range of")
        if shapes[name].type.tensor_type.elem_type != TensorProto.FLOAT:
            raise StageError(f"tensor {name!r} is not float32, so it has no range")
        model.graph.output.append(shapes[name])
    return replace(graph, model=model.SerializeToString())


def _open(graph: Graph) -> OnnxRuntimeSession:
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # What the plan names must exist while it runs, as it was exported; fusions would compute it another way.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return OnnxRuntimeSession(inference_session(graph, options))
