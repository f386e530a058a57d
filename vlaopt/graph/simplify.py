"""Pass: the same function with fewer nodes. Constants folded, shapes filled in, identities and batch norms merged."""

from __future__ import annotations

import onnx
import onnxsim
from onnx import ModelProto

from vlaopt.errors import InputError, StageError
from vlaopt.graph.check import check
from vlaopt.graph.naming import tidy
from vlaopt.graph.topology import opset_of, unique


def simplify(model: ModelProto) -> ModelProto:
    """`model` after onnxsim, in canonical bytes. Nodes that stay keep their names; merged ones the name of the first.

    Operators such as LayerNormalization stay whole, and the opset stays. Parity with the original is for the caller to
    measure. Raises StageError when onnxsim fails, when its result is not valid, or has other inputs or outputs.
    """
    try:
        simplified, _ = onnxsim.simplify(model, check_n=0)
    except (RuntimeError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"onnxsim cannot simplify the graph: {error}", hint="onnx.simplify: false") from error
    result = _named(tidy(simplified))
    _check_interface(model, result)
    try:
        check(result, domains={node.domain for node in model.graph.node})
    except InputError as error:
        raise StageError(f"simplified into a graph that is {error.message}", hint="onnx.simplify: false") from error
    return result


def _check_interface(before: ModelProto, after: ModelProto) -> None:
    for what in ("input", "output"):
        old = [(value.name, value.type) for value in getattr(before.graph, what)]
        new = [(value.name, value.type) for value in getattr(after.graph, what)]
        if [name for name, _ in old] != [name for name, _ in new]:
            raise StageError(f"simplification changed the {what}s of the graph", hint="onnx.simplify: false")
    if opset_of(before) != opset_of(after):
        raise StageError(f"simplification changed the opset from {opset_of(before)} to {opset_of(after)}")


def _named(model: ModelProto) -> ModelProto:
    """Every node with a name of its own: what a rewrite made without one is called after its first output."""
    taken: set[str] = set()
    for node in model.graph.node:
        node.name = unique(node.name or node.output[0], taken)
    return model
