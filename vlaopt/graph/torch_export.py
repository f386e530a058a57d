"""From one PyTorch module to one ONNX graph with static shapes, by torch's dynamo exporter.

The only file of this room that imports torch. Knows nothing of policies.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import onnx
import torch
from onnx import ModelProto, NodeProto
from torch import nn

from vlaopt.errors import StageError
from vlaopt.graph.naming import rename
from vlaopt.graph.topology import opset_of

OLDEST_OPSET = 18
SIZE_LIMIT = 2**31 - 1
"""Bytes of one protobuf message; a larger graph needs external data."""

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_REWRITTEN = "pkg.onnxscript.rewriter.rule_name"


def export_component(
    module: nn.Module, example_inputs: Mapping[str, torch.Tensor], output_names: Sequence[str], *, opset: int
) -> ModelProto:
    """The FP32 graph of `module` in evaluation mode, with the shapes and dtypes of `example_inputs`.

    `example_inputs` are in the order of the module's arguments; the graph's inputs and outputs get their names and
    `output_names`. Nodes are named after the module they came from (see `topology`). Equal modules give equal bytes.
    The module keeps the mode it was in. Raises StageError with the exporter's reason, when the graph does not have the
    asked opset, inputs or outputs, and when it is above 2 GB.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluation(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_quiet())
        model = _export(module, example_inputs, output_names, opset)
    _check(model, list(example_inputs), list(output_names), opset)
    return rename(model, {node.name: _scope(node) for node in model.graph.node})


def _export(module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], opset: int) -> ModelProto:
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
    model: ModelProto = program.model_proto
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return model


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
    if model.ByteSize() > SIZE_LIMIT:
        raise StageError(
            f"the exported graph takes {model.ByteSize() / 2**30:.1f} GiB, more than one ONNX file may hold (2 GiB)",
            hint="split the component",
        )


def _scope(node: NodeProto) -> str:
    """The path of the module that a node of the exporter came from.

    A convolution that the exporter fused with its batch norm is listed under the norm; its weight says better. Weights
    of other nodes say less: a tied weight has the name of its first owner.
    """
    properties = {entry.key: entry.value for entry in node.metadata_props}
    if _REWRITTEN in properties and len(node.input) > 1 and node.input[1].endswith(".weight"):
        return str(node.input[1]).removesuffix(".weight")
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
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
