"""Pass: the same function with fewer nodes. Constants folded, shapes filled in, identities and batch norms merged, then
slices of sequences joined and factors multiplied into weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
import onnxsim
from onnx import ModelProto, TensorProto, helper

from vlaopt.errors import InputError, StageError
from vlaopt.graph import external
from vlaopt.graph.check import check
from vlaopt.graph.external import is_outside, size, without_initializers
from vlaopt.graph.naming import tidy
from vlaopt.graph.scales import fold_scales
from vlaopt.graph.slices import join_slices
from vlaopt.graph.topology import constants, consumers, node_name, opset_of, producers, scope_of, unique
from vlaopt.graph.unused import drop_unused

WHOLE = 1 << 30
"""Bytes of weights up to which onnxsim sees them all."""


def simplify(model: ModelProto, data: bytes = b"") -> ModelProto:
    """`model` after onnxsim, `join_slices` and `fold_scales`, in canonical form. Nodes that stay keep their names, new
    ones say their module.

    `data` is where the weights lie that are not in it: these are neither folded nor merged, and of more weights than
    `WHOLE` the large ones are not either, for onnxsim has what it is given six times in memory. Operators such as
    LayerNormalization stay whole, and the opset stays. Parity with the original is for the caller to measure. Raises
    StageError when onnxsim fails, when its result is not valid, or has other inputs or outputs.
    """
    held = _held_back(model)
    try:
        simplified, _ = onnxsim.simplify(_with_inputs(model, held) if held else model, check_n=0)
    except (RuntimeError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"onnxsim cannot simplify the graph: {error}", hint="onnx.simplify: false") from error
    if held:
        _put_back(simplified, held)
    fold_scales(join_slices(simplified))
    drop_unused(simplified.graph)
    result = _named(model, tidy(simplified))
    _check_interface(model, result)
    try:
        check(result, data, domains={node.domain for node in model.graph.node})
    except InputError as error:
        raise StageError(f"simplified into a graph that is {error.message}", hint="onnx.simplify: false") from error
    return result


def _held_back(model: ModelProto) -> dict[str, TensorProto]:
    """The weights that onnxsim is not given, by name."""
    weights = model.graph.initializer
    smallest = external.SMALLEST if sum(map(size, weights)) > WHOLE else math.inf
    return {tensor.name: tensor for tensor in weights if is_outside(tensor) or size(tensor) >= smallest}


def _with_inputs(model: ModelProto, held: Mapping[str, TensorProto]) -> ModelProto:
    """A copy in which the weights `held` are inputs, which onnxsim passes through."""
    result = without_initializers(model)
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in held)
    result.graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in held.items()
    )
    return result


def _put_back(model: ModelProto, held: Mapping[str, TensorProto]) -> None:
    """Make the inputs of `_with_inputs` weights again, those that still are used."""
    graph = model.graph
    kept = [value for value in graph.input if value.name not in held]
    del graph.input[:]
    graph.input.extend(kept)
    used = consumers(graph)
    graph.initializer.extend(tensor for name, tensor in held.items() if name in used)


def _check_interface(before: ModelProto, after: ModelProto) -> None:
    for what in ("input", "output"):
        old = [(value.name, value.type) for value in getattr(before.graph, what)]
        new = [(value.name, value.type) for value in getattr(after.graph, what)]
        if [name for name, _ in old] != [name for name, _ in new]:
            raise StageError(f"simplification changed the {what}s of the graph", hint="onnx.simplify: false")
    if opset_of(before) != opset_of(after):
        raise StageError(f"simplification changed the opset from {opset_of(before)} to {opset_of(after)}")


def _named(before: ModelProto, model: ModelProto) -> ModelProto:
    """Every node with a name of its own that says its module, so that scopes of recipes find it."""
    kept = {node.name for node in before.graph.node if node.name}
    modules = _modules(before, model, kept)
    taken = kept & {node.name for node in model.graph.node}
    for node in model.graph.node:
        if node.name not in kept:
            node.name = unique(node_name(modules[node.output[0]], node.op_type), taken)
    return model


def _modules(before: ModelProto, model: ModelProto, kept: set[str]) -> dict[str, str]:
    """The module of every node of `model`, by its first output.

    A node that a rewrite made belongs to the module of the constants it takes, such as the weights of a product that a
    bias was merged into; else of the tensor it gives; else of all that take what it gives, such as three products that
    became one.
    """
    takers, makers = consumers(before.graph), producers(before.graph)
    fixed = constants(before.graph)
    found: dict[str, str] = {}
    following = consumers(model.graph)
    for node in reversed(model.graph.node):
        if node.name in kept:
            found[node.output[0]] = scope_of(node.name)
            continue
        users = [{scope_of(user.name) for user in takers.get(name, [])} for name in node.input if name in fixed]
        after = [found[user.output[0]] for name in node.output for user in following.get(name, [])]
        made = [scope_of(makers[name].name) for name in node.output if name in makers]
        alone = [min(scopes) for scopes in users if len(scopes) == 1]
        found[node.output[0]] = alone[0] if alone else _common(made or after)
    return found


def _common(scopes: list[str]) -> str:
    """The innermost module that holds all of these."""
    shared = []
    for parts in zip(*(scope.split(".") for scope in scopes), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
