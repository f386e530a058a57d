"""The largest |x| that tensors take while a graph runs: what decides where FP16 would overflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vlaopt.artifact.graph import Graph
from vlaopt.backends import check_feeds
from vlaopt.backends.onnxruntime import OnnxRuntimeSession, inference_session
from vlaopt.errors import InputError
from vlaopt.graph.external import decode
from vlaopt.graph.topology import tensor_names, unique
from vlaopt.optional import require
from vlaopt.progress import Progress, track
from vlaopt.quantization.collect import Feeds


def largest_values(graph: Graph, feeds: Feeds, tensors: Sequence[str], progress: Progress) -> dict[str, float]:
    """max |x| of the float32 `tensors` of `graph` over all calls of `feeds`, every denoise step; infinities left out.

    The maxima are taken within the graph, so that no tensor is held longer than ONNX Runtime itself needs it. Raises
    InputError when there is no sample.
    """
    if not tensors:
        return {}
    model = decode(graph)
    names = _add_maxima(model, tensors)
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # What the plan names must exist while it runs: a fusion would compute it another way.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = OnnxRuntimeSession(inference_session(replace(graph, model=model.SerializeToString()), options))
    found: dict[str, float] = {}
    for _, feed in track(progress, "looking for what FP16 cannot hold", feeds()):
        check_feeds(session.inputs, feed)
        _take(found, names, session.run(feed))
    if not found:
        raise InputError("no calibration samples", hint="name a calibration set with samples (calibration.path)")
    return found


def _take(found: dict[str, float], names: Mapping[str, str], computed: Mapping[str, np.ndarray]) -> None:
    for tensor, name in names.items():
        found[tensor] = max(found.get(tensor, 0.0), float(computed[name]))


def _add_maxima(model: ModelProto, tensors: Sequence[str]) -> dict[str, str]:
    """Outputs of the graph, in place, that say max |x|: their names by tensor."""
    graph = model.graph
    taken = tensor_names(graph)
    zero = unique("probe zero", taken)
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), zero))
    names = {}
    for tensor in tensors:
        infinite, size, finite, most = (unique(f"{tensor} {part}", taken) for part in ("inf", "abs", "finite", "max"))
        graph.node.extend(
            [
                helper.make_node("IsInf", [tensor], [infinite], name=infinite),
                helper.make_node("Abs", [tensor], [size], name=size),
                helper.make_node("Where", [infinite, zero, size], [finite], name=finite),
                helper.make_node("ReduceMax", [finite], [most], name=most, keepdims=0),
            ]
        )
        graph.output.append(helper.make_tensor_value_info(most, TensorProto.FLOAT, ()))
        names[tensor] = most
    return names
