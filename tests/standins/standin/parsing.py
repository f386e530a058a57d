"""What TensorRT's ONNX parser refuses, with its own words: file, function, line and assertion as it gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from standin.onnx_file import Node, OnnxGraph, read

UNSUPPORTED = frozenset({
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "Compress",
    "ConcatFromSequence", "ConvInteger", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger",
    "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional",
    "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence",
    "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique",
})  # fmt: skip
"""Operators of ONNX that the parser knows and refuses."""

_FLOATS = ("FLOAT", "HALF", "BF16")
_SHOWN = {"FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "INT32": "Int32", "UINT8": "UInt8", "INT8": "Int8"}
# Operators whose float inputs must be of one type, and the layer that the builder makes of them.
_TYPED = {
    "MatMul": "IMatrixMultiplyLayer", "Gemm": "IMatrixMultiplyLayer", "Conv": "IConvolutionLayer",
    "ConvTranspose": "IDeconvolutionLayer", "Concat": "IConcatenationLayer", "Einsum": "IEinsumLayer",
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Equal", "Less", "Greater"], "IElementWiseLayer"),
    "LayerNormalization": "INormalizationLayer", "PRelu": "IParametricReLULayer", "Where": "ISelectLayer",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One refusal; `index` is the node's place in the graph."""

    code: str
    description: str
    file: str
    function: str
    line: int
    index: int
    refused: Node
    lane: str

    @property
    def node(self) -> str:
        return self.refused.name

    @property
    def operator(self) -> str:
        return self.refused.operator

    def log(self) -> list[str]:
        """The lines that the parser gives the logger: before 11 with the node as Protocol Buffers write it."""
        number = {"UNSUPPORTED_NODE": 8, "INVALID_NODE": 6}[self.code]
        node, output = self.refused, self.refused.outputs[0]
        told = f"Node name: {node.name}"
        if self.lane.startswith("10."):
            lines = [f'input: "{name}"' for name in node.inputs] + [f'output: "{name}"' for name in node.outputs]
            lines += [f'name: "{node.name}"', f'op_type: "{node.operator}"']
            told = "\n".join([*lines, *([f'domain: "{node.domain}"'] if node.domain else []), ""])
        return [
            f'ModelImporter.cpp:140: While parsing node number {self.index} [{node.operator} -> "{output}"]:',
            f"ModelImporter.cpp:142: --- Begin node ---\n{told}",
            "ModelImporter.cpp:143: --- End node ---",
            f"ModelImporter.cpp:151: ERROR: {self.file}:{self.line} In function {self.function}:\n"
            f"[{number}] {self.description}",
        ]


@dataclass
class Parsed:
    graph: OnnxGraph | None
    data: bytes = b""
    data_name: str = ""
    warnings: list[str] = field(default_factory=list)
    fault: Fault | None = None


def parse(model: bytes, folder: Path | None, *, strong: bool, lane: str) -> Parsed:
    """The graph, or the first refusal. Bytes that are no ONNX file give neither."""
    try:
        graph = read(model)
    except ValueError:
        return Parsed(None)
    parsed = Parsed(graph)
    files = sorted({weight.file for weight in graph.weights.values() if weight.file})
    if len(files) > 1:
        raise NotImplementedError("stand-in: weights in more than one file")
    if files:
        if folder is None or not (folder / files[0]).is_file():
            parsed.graph = None
            return parsed
        parsed.data, parsed.data_name = (folder / files[0]).read_bytes(), files[0]
    for index, node in enumerate(graph.nodes):
        found = _refused(node, graph, lane) or (_mixed(node, graph) if strong else None)
        if found is not None:
            parsed.fault = Fault(*found, index, node, lane)
            return parsed
        if node.operator == "QuantizeLinear" and graph.types.get(node.outputs[0]) == "UINT8":
            parsed.warnings.append(
                "onnxOpImporters.cpp:1988: TensorRT doesn't support QuantizeLinear with UINT8 zero_point. Defaulting "
                "to INT8."
            )
    return parsed


Refusal = tuple[str, str, str, str, int]


def _refused(node: Node, graph: OnnxGraph, lane: str) -> Refusal | None:
    if node.domain not in ("", "ai.onnx"):
        text = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
        return "INVALID_NODE", text, "onnxOpCheckers.cpp", "checkFallbackPluginImporter", 998
    if node.operator in UNSUPPORTED:
        return "UNSUPPORTED_NODE", "false", "onnxOpCheckers.cpp", f"check{node.operator}", 1130
    if lane == "10.3" and "FP4" in {graph.types.get(name) for name in (*node.inputs, *node.outputs)}:
        text = "Assertion failed: convertOnnxDataType: Unsupported ONNX data type: FLOAT4E2M1 (23)"
        return "INVALID_NODE", text, "onnxOpImporters.cpp", "importer", 1901
    if node.operator not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    if len(node.inputs) > 2 and node.inputs[2]:
        point = graph.weights.get(node.inputs[2])
        if point is not None and not point.zero:
            text = "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported."
            if not lane.startswith("10.3"):
                text += (
                    " Please set kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA to enable asymmetric quantization if it "
                    "is on DLA."
                )
            return "INVALID_NODE", text, "onnxOpImporters.cpp", "buildZeroPointTensor", 1929
    if node.operator == "DequantizeLinear" and graph.types.get(node.inputs[0]) in ("INT32", "INT16", "UINT16"):
        kind = graph.types[node.inputs[0]]
        text = (
            f"{node.name}: input has type {_SHOWN.get(kind, kind)} but must have type FP8, FP4, Int4, Int8, or UInt8. "
            "In checkType at optimizer/common/nodeBase.cpp:456"
        )
        return _invalid(node, text)
    return None


def _mixed(node: Node, graph: OnnxGraph) -> Refusal | None:
    layer = _TYPED.get(node.operator)
    kinds = [graph.types.get(name, "FLOAT") for name in node.inputs if name]
    floats = [kind for kind in kinds if kind in _FLOATS]
    if layer is None or len(set(floats)) < 2:
        return None
    first, second = floats[0], next(kind for kind in floats if kind != floats[0])
    text = (
        f"{node.name}: {layer} must have same input types. `A` is of type {_SHOWN[first]} and `B` is of type "
        f"{_SHOWN[second]}. In validateTypes at optimizer/common/nodes/matrixMultiplyNode.cpp:38"
    )
    return _invalid(node, text)


def _invalid(node: Node, text: str) -> Refusal:
    description = f"Invalid Node - {node.name}\nITensor::getDimensions: Error Code 4: API Usage Error ({text})"
    return "INVALID_NODE", description, "ModelImporter.cpp", "parseNode", 489
