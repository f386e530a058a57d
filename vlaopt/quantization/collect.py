"""Ranges of a graph's tensors: run the FP32 graph on calibration data and show what it computes to a calibrator."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx
from onnx import TensorProto

from vlaopt.artifact.graph import Graph
from vlaopt.backends import check_feeds
from vlaopt.backends.onnxruntime import OnnxRuntimeSession, inference_session
from vlaopt.errors import InputError, StageError
from vlaopt.graph.external import decode, light
from vlaopt.optional import require
from vlaopt.progress import Progress, track
from vlaopt.quantization.calibrators import Calibrator, Extremes, Histogram, Range
from vlaopt.tensors import Array

Feeds = Callable[[], Iterable[tuple[str, Mapping[str, Array]]]]
"""Gives the component's inputs call by call, each with a label ("12", "12, step 3") that says of which sample.

Asked once per pass, the same each time.
"""

OUTLIER = 1e6
"""A sample whose largest |x| is this many times that of the usual sample would leave one code to all the others."""


def collect_ranges(
    graph: Graph, feeds: Feeds, tensors: Sequence[str], calibrator: Calibrator, progress: Progress
) -> dict[str, Range]:
    """The range of every tensor in `tensors` (float inputs and intermediate values of `graph`), by name.

    Two passes over `feeds`, one call at a time, in FP32 on one thread, so that neither the batch size nor the order
    of the samples nor the machine's cores changes a range. Raises InputError when there is no sample, when a tensor
    takes a value that is not finite or is an outlier by `OUTLIER` (naming tensor and sample), and when the second pass
    shows other data than the first; StageError when `graph` has no such tensor or does not run.
    """
    if not tensors:
        return {}
    session = _open(_with_outputs(graph, tensors))
    extremes, samples = _find_extremes(_values(session, feeds, tensors, progress, "finding extremes"), tensors)
    histograms = {name: Histogram(extremes[name]) for name in tensors}
    seen = 0
    for sample, values in _values(session, feeds, tensors, progress, "counting values"):
        for name, value in values.items():
            _placed(histograms[name].add, value, name, sample)
        seen += 1
    if seen != samples:
        raise InputError(f"the calibration data changed: {samples} samples in the first pass, {seen} in the second")
    return {name: calibrator.range(histogram) for name, histogram in histograms.items()}


def _find_extremes(
    passing: Iterator[tuple[str, dict[str, Array]]], tensors: Sequence[str]
) -> tuple[dict[str, Extremes], int]:
    extremes = {name: Extremes() for name in tensors}
    largest: dict[str, list[float]] = {name: [] for name in tensors}
    samples: list[str] = []
    for sample, values in passing:
        samples.append(sample)
        for name, value in values.items():
            found = _placed(Extremes().including, value, name, sample)
            largest[name].append(found.amax)
            extremes[name] = Extremes(min(extremes[name].low, found.low), max(extremes[name].high, found.high))
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
    return extremes, len(samples)


def _placed(take: Callable[[Array], Extremes | None], value: Array, name: str, sample: str) -> Extremes:
    try:
        return take(value) or Extremes()
    except InputError as error:
        raise InputError(f"tensor {name!r}, calibration sample {sample}: {error.message}", hint=error.hint) from error


def _values(
    session: OnnxRuntimeSession, feeds: Feeds, tensors: Sequence[str], progress: Progress, label: str
) -> Iterator[tuple[str, dict[str, Array]]]:
    for sample, feed in track(progress, label, feeds()):
        check_feeds(session.inputs, feed)
        computed = session.run(feed)
        yield sample, {name: computed[name] if name in computed else feed[name] for name in tensors}


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
