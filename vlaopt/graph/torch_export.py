"""From one PyTorch module to one ONNX graph with static shapes, by torch's dynamo exporter.

The only file of this room that imports torch. Knows nothing of policies.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import onnx_ir
import onnxscript
import torch
from onnx import ModelProto
from onnx_ir.passes.common import InlinePass
from torch import nn

from vlaopt.artifact.graph import Graph
from vlaopt.errors import StageError
from vlaopt.graph import external
from vlaopt.graph.naming import rename
from vlaopt.graph.topology import opset_of
from vlaopt.hashing import digest_bytes

OLDEST_OPSET = 18
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_REWRITTEN = "pkg.onnxscript.rewriter.rule_name"


def export_component(
    module: nn.Module,
    example_inputs: Mapping[str, torch.Tensor],
    output_names: Sequence[str],
    *,
    opset: int,
    name: str = "component",
) -> Graph:
    """The FP32 graph of `module` in evaluation mode, with the shapes and dtypes of `example_inputs`.

    `example_inputs` are in the order of the module's arguments; the graph's inputs and outputs get their names and
    `output_names`. Nodes are named after the module they came from (see `topology`). Equal weights are stored once.
    Equal modules give equal bytes; `name` names the file of weights that are too many for one. The module keeps the
    mode it was in. Raises StageError with the exporter's reason, and when the graph does not have the asked opset,
    inputs or outputs.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluation(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_quiet())
        program = _export(module, example_inputs, output_names, opset)
        scopes = {str(node.name): _scope(node) for node in program.graph}
        _store_once(program)
        weights = _set_aside(program)
        model = onnx_ir.to_proto(program)
    _check(model, list(example_inputs), list(output_names), opset)
    rename(model, scopes)
    return external.encode_from(model, name, lambda tensor: weights[external.offset(tensor)].tobytes())


def _export(module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], opset: int) -> onnx_ir.Model:
    try:
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise StageError(
            f"torch cannot export {type(module).__name__}: {_reason(error)}",
            hint="the forward pass must be traceable by torch.export: no control flow on tensor values",
        ) from error
    if program is None:
        raise StageError(f"torch exported nothing for {type(module).__name__}")
    _let_go()
    InlinePass()(program.model)
    model: onnx_ir.Model = program.model
    return model


def _let_go() -> None:
    """Have onnxscript's rules look at another graph: each keeps the last one that it saw, with all of its weights.

    A rule for several slices forgets only over a slice.
    """
    given = [onnx_ir.val("x", onnx_ir.DataType.FLOAT, (4,))]
    given += [onnx_ir.val(name, onnx_ir.DataType.INT64, (1,)) for name in ("begin", "end", "axes")]
    node = onnx_ir.Node("", "Slice", given)
    graph = onnx_ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": OLDEST_OPSET}, name="empty")
    onnxscript.optimizer.optimize(onnx_ir.Model(graph, ir_version=10))


def _store_once(program: onnx_ir.Model) -> None:
    """Let all that take equal weights take the first of them. (onnx-ir's own pass fails on transposed views.)"""
    first: dict[Any, onnx_ir.Value] = {}
    for name, value in list(program.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            continue
        kept = first.setdefault((tensor.dtype, tensor.shape.numpy(), digest_bytes(tensor.tobytes())), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del program.graph.initializers[name]


def _set_aside(program: onnx_ir.Model) -> list[onnx_ir.TensorProtocol]:
    """Take large weights, which still are the module's own memory, out of a program; its tensors say which is where."""
    weights: list[onnx_ir.TensorProtocol] = []
    for value in program.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= external.SMALLEST:
            shape = onnx_ir.Shape(tensor.shape.numpy())
            value.const_value = onnx_ir.ExternalTensor(
                "aside", len(weights), tensor.nbytes, tensor.dtype, shape=shape, name=str(value.name)
            )
            weights.append(tensor)
    return weights


def _check(model: ModelProto, inputs: list[str], outputs: list[str], opset: int) -> None:
    got = opset_of(model)
    if got != opset or got < OLDEST_OPSET:
        raise StageError(
            f"the exporter wrote opset {got}, asked for {opset}",
            where="export.opset",
            hint=f"export.opset: {max(got, OLDEST_OPSET)}",
        )
    for what, asked, values in (("inputs", inputs, model.graph.input), ("outputs", outputs, model.graph.output)):
        found = [value.name for value in values]
        if found != asked:
            raise StageError(f"the exported graph has the {what} {', '.join(found)}, not {', '.join(asked)}")
        for value in values:
            if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
                raise StageError(f"the exported graph's {value.name} has a shape that is not static")


def _scope(node: onnx_ir.Node) -> str:
    """The path of the module that a node of the exporter came from.

    A convolution that the exporter fused with its batch norm is listed under the norm; its weight says better. Weights
    of other nodes say less: a tied weight has the name of its first owner.
    """
    properties = node.metadata_props
    weight = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if _REWRITTEN in properties and weight and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    scopes = properties.get(_NAME_SCOPES, "")
    # The value is the repr of a list of strings: the modules from the outside in, then the operation itself.
    names = [part.strip().strip("'\"") for part in scopes.strip("[]").split(", ")]
    return names[-2] if len(names) > 1 else ""


def _reason(error: BaseException) -> str:
    """The innermost cause's first line that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in training.items():
            child.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings: about libraries that are not needed and about torch's own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
