"""Pass: the same graph in a newer opset, for operators and element types that only newer ones have."""

from __future__ import annotations

from onnx import ModelProto, helper, version_converter

from vlaopt.errors import StageError
from vlaopt.graph.check import OPSETS
from vlaopt.graph.external import light, without_initializers
from vlaopt.graph.topology import opset_of

_IR_VERSIONS = {opset: helper.OP_SET_ID_VERSION_MAP[("ai.onnx", opset)] for opset in OPSETS}


def raised(model: ModelProto, opset: int) -> ModelProto:
    """`model` by onnx's own converter, or itself when its opset is not below `opset`. Nodes keep their names.

    Raises StageError when the converter has no newer form of a node.
    """
    if opset_of(model) >= opset:
        return model
    small = light(model, least=1)
    try:
        converted = version_converter.convert_version(small, opset)
    except (RuntimeError, ValueError) as error:
        raise StageError(f"opset {opset_of(model)} cannot be raised to {opset}: {error}") from error
    inputs = {value.name for value in model.graph.input}
    result = without_initializers(converted)
    kept = [value for value in result.graph.input if value.name in inputs]
    del result.graph.input[:]
    result.graph.input.extend(kept)
    result.graph.initializer.extend(model.graph.initializer)
    result.ir_version = max(model.ir_version, _IR_VERSIONS[opset])
    return result
