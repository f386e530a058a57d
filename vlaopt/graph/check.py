"""Is this a graph that vlaopt works on? Refuses, by node or tensor name, what is not."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from vlaopt.artifact.graph import Graph
from vlaopt.errors import InputError
from vlaopt.graph.external import array, decode, is_outside, light, tensors
from vlaopt.graph.topology import graphs, opset_of
from vlaopt.tensors import Array

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

OPSETS = range(18, 25)
"""Opsets whose graphs are taken: LayerNormalization and the present reductions exist from 18 on."""

NEWEST_IR = 11
"""The IR version that goes with the newest of `OPSETS`."""

RANDOM_OPERATORS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Two runs differ, so nothing computed with them can be compared with a reference."""


def load(graph: Graph, *, where: str | None = None, domains: Collection[str] = ("",)) -> ModelProto:
    """The checked model of `graph`. Raises InputError, placed at `where`, when it is damaged or refused by `check`."""
    model = decode(graph, where=where)
    check(model, graph.data, where=where, domains=domains)
    return model


def check(model: ModelProto, data: bytes = b"", *, where: str | None = None, domains: Collection[str] = ("",)) -> None:
    """Raise InputError unless `model` is valid ONNX that gives one answer for one input.

    `data` is where the weights lie that are not in it. Refused by name: an IR version, opset or operator domain that is
    not taken (`domains` holds those that are), an operator that draws random numbers, damaged constants, and those with
    NaN or infinity. An infinite scalar and a mask
    of zeros and infinities are what exporters write for attention, so they pass. Then onnx checks the graph in full,
    with strict shape inference.
    """
    if not model.graph.node and not model.graph.output:
        raise InputError("not an ONNX graph: it has no nodes and no outputs", where=where)
    _check_versions(model, where)
    for node in _nodes(model):
        _check_node(node, domains, where)
    for owner, tensor in tensors(model):
        _check_tensor(owner, tensor, data, where)
    try:
        onnx.checker.check_model(light(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise InputError(f"not valid ONNX: {_reason(error)}", where=where) from error


def _check_versions(model: ModelProto, where: str | None) -> None:
    if model.ir_version > NEWEST_IR:
        raise InputError(
            f"IR version {model.ir_version} is newer than {NEWEST_IR}", where=where, hint="export with an older onnx"
        )
    opset = opset_of(model)
    if opset not in OPSETS:
        raise InputError(
            f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[-1]}", where=where, hint="export with opset 20"
        )


def _check_node(node: NodeProto, domains: Collection[str], where: str | None) -> None:
    label = f"node {node.name!r} ({node.op_type})"
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain not in domains:
        raise InputError(
            f"{label} is of the domain {node.domain!r}",
            where=where,
            hint=f"only standard ONNX operators run on every backend; domains taken: {_names(domains)}",
        )
    if domain == "" and node.op_type in RANDOM_OPERATORS:
        raise InputError(
            f"{label} draws random numbers",
            where=where,
            hint="make the noise an input of the component: the loop draws it",
        )


def _check_tensor(owner: str, tensor: TensorProto, data: bytes, where: str | None) -> None:
    if tensor.data_type == TensorProto.STRING:
        return
    if is_outside(tensor) and not data:
        raise InputError(f"{owner} is stored outside the graph, in data that are not there", where=where)
    try:
        values = array(tensor, data)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{owner} is damaged: {_reason(error)}", where=where) from error
    if tensor.data_type not in _FLOATS:
        return
    finite = np.isfinite(values)
    if not finite.all() and not _is_mask(values, finite):
        raise InputError(
            f"{owner} has {np.count_nonzero(~finite)} of {values.size} values that are NaN or infinite",
            where=where,
            hint="the checkpoint is damaged or its training diverged",
        )


def _is_mask(values: Array, finite: Array) -> bool:
    """Whether infinities are meant: one infinite scalar, or zeros and negative infinities."""
    if values.size == 1:
        return bool(np.isinf(values).all())
    return bool(finite.any() and not values[finite].any() and np.isneginf(values[~finite]).all())


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _names(domains: Collection[str]) -> str:
    return ", ".join(repr(name or "ai.onnx") for name in sorted(domains))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
