"""What TensorRT takes of a graph besides its Q/DQ nodes: operators, float types, norms. Its builder lets some pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from vlaopt.graph.topology import constants, consumers, graphs, opset_of, producers
from vlaopt.quantization.halves import HALVES, element_types
from vlaopt.quantization.structure import QDQ, Fault

UNSUPPORTED = frozenset(
    (
        *("AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *("CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "DeformConv"),
        *("Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool"),
        *("MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement"),
        *("OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct"),
        *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap"),
        *("SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU"),
        *("TfIdfVectorizer", "Unique"),
    )
)
"""Standard operators that the parser of TensorRT for RTX 1.7, of the time of 11.4, says it lacks (`supports_operator`).

Parsers only gain operators, so those of 10.x lack them too; a plug-in of the user's own could still bring one.
"""

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_ONE_TYPE = frozenset({"GridSample"})
"""ONNX lets their float operands differ, TensorRT does not."""


def tensorrt_faults(model: ModelProto) -> list[Fault]:
    """What TensorRT refuses of a graph, or computes wrongly, by node: see the module's constants and below.

    Operators that it lacks, float operands of different types in one operator, and norms in single operators whose
    squares or sums are FP16 or BF16. Of subgraphs the operators alone are looked at.
    """
    faults = [
        Fault(node.name, node.op_type, "is an operator that TensorRT lacks", "operator")
        for graph in graphs(model.graph)
        for node in graph.node
        if node.domain in ("", "ai.onnx") and node.op_type in UNSUPPORTED
    ]
    kinds, opset = element_types(model), opset_of(model)
    faults += [fault for node in model.graph.node if (fault := _mixed(node, kinds, opset))]
    return [*faults, *_norms(model.graph, kinds)]


def _mixed(node: NodeProto, kinds: Mapping[str, int], opset: int) -> Fault | None:
    """A strongly typed network casts nothing by itself."""
    if node.domain not in ("", "ai.onnx") or node.op_type in QDQ or node.op_type in UNSUPPORTED:
        return None
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    variables = {entry.type_param_str for entry in schema.type_constraints}
    found: dict[str, dict[int, str]] = {}
    for at, name in enumerate(node.input):
        formal = schema.inputs[min(at, len(schema.inputs) - 1)]
        kind = kinds.get(name, 0)
        if kind not in _FLOATS or formal.type_str not in variables or not formal.is_homogeneous:
            continue
        group = "" if node.op_type in _ONE_TYPE else formal.type_str
        found.setdefault(group, {}).setdefault(kind, name)
    for operands in found.values():
        if len(operands) > 1:
            told = " and ".join(f"{_type(kind)} ({name!r})" for kind, name in operands.items())
            return Fault(node.name, node.op_type, f"mixes {told}: TensorRT takes one type", "precision")
    return None


def _norms(graph: GraphProto, kinds: Mapping[str, int]) -> Iterator[Fault]:
    """LayerNorm and RMSNorm as x² → ReduceMean → (+ epsilon) → Sqrt → a quotient, in half precision."""
    made, takers, fixed = producers(graph), consumers(graph), constants(graph)

    def maker(tensor: str) -> NodeProto | None:
        """What makes a tensor, casts aside."""
        node = made.get(tensor)
        while node is not None and node.op_type == "Cast":
            node = made.get(node.input[0])
        return node

    def varying(node: NodeProto) -> str:
        """The operand of a sum that is not constant."""
        found: str = next((name for name in node.input if name not in fixed), node.input[0])
        return found

    for root in graph.node:
        if root.op_type != "Sqrt" or not _divides(root.output[0], takers):
            continue
        mean = maker(root.input[0])
        if mean is not None and mean.op_type == "Add":
            mean = maker(varying(mean))
        square = maker(mean.input[0]) if mean is not None and mean.op_type == "ReduceMean" else None
        if mean is None or square is None or not _squares(square, fixed):
            continue
        half = next(
            (name for name, kind in HALVES.items() if kind in {kinds.get(square.output[0]), _of(mean, kinds)}), ""
        )
        if not half:
            continue
        centred = maker(square.input[0])
        kind = "LayerNorm" if centred is not None and centred.op_type == "Sub" else "RMSNorm"
        loses = "squares end at 65504" if half == "fp16" else "a sum keeps 8 binary digits"
        yield Fault(
            square.name,
            square.op_type,
            f"belongs to a {kind} in single operators that computes in {half}, where {loses}",
            "precision",
        )


def _of(mean: NodeProto, kinds: Mapping[str, int]) -> int:
    return kinds.get(mean.output[0], 0)


def _divides(tensor: str, takers: Mapping[str, list[NodeProto]]) -> bool:
    """Whether something is divided by a tensor, casts aside."""
    for node in takers.get(tensor, []):
        if node.op_type == "Reciprocal" or (node.op_type == "Div" and node.input[1] == tensor):
            return True
        if node.op_type == "Cast" and _divides(node.output[0], takers):
            return True
    return False


def _squares(node: NodeProto, fixed: Mapping[str, TensorProto]) -> bool:
    if node.op_type == "Mul":
        return bool(node.input[0] == node.input[1])
    if node.op_type != "Pow" or node.input[1] not in fixed:
        return False
    exponent = onnx.numpy_helper.to_array(fixed[node.input[1]])
    return bool(exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0)


def _type(kind: int) -> str:
    return next((name for name, number in HALVES.items() if number == kind), "fp32")
