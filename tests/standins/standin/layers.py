"""The kernels that a builder would make of a graph, and the inspector's words for them.

Precision comes from the graph alone: a product whose two operands are dequantized is INT8 (FP8, FP4), else it is of its
float type. Q and DQ nodes at products vanish into them, as biases and activations do.
"""

from __future__ import annotations

from typing import Any

from standin.onnx_file import BITS, Node, OnnxGraph

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}
LAYER_TYPES = {
    "Conv": "CONVOLUTION", "ConvTranspose": "DECONVOLUTION", "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Cast": "CAST", "Softmax": "SOFTMAX",
    "Relu": "ACTIVATION", "Sigmoid": "ACTIVATION", "Tanh": "ACTIVATION", "Add": "ELEMENTWISE", "Mul": "ELEMENTWISE",
    "Sub": "ELEMENTWISE", "Div": "ELEMENTWISE", "Pow": "ELEMENTWISE", "LayerNormalization": "NORMALIZATION",
    "ReduceMean": "REDUCE", "ReduceSum": "REDUCE", "Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "Flatten": "SHUFFLE",
    "Squeeze": "SHUFFLE", "Unsqueeze": "SHUFFLE", "Gather": "GATHER", "Concat": "CONCATENATION", "Slice": "SLICE",
    "Constant": "CONSTANT", "Shape": "SHAPE", "Where": "SELECT", "MaxPool": "POOLING", "AveragePool": "POOLING",
    "GlobalAveragePool": "REDUCE", "Sqrt": "UNARY", "Exp": "UNARY", "Erf": "UNARY", "Resize": "RESIZE",
    "LSTM": "RECURRENCE", "GRU": "RECURRENCE",
}  # fmt: skip

_LOW = {"INT8": "INT8", "UINT8": "INT8", "FP8": "FP8", "FP4": "FP4"}
_FLOAT = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16"}
_ACTIVATIONS = {"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "Gelu"}
# Nodes that cost no kernel: constants, and shapes seen otherwise.
_FREE = {"Constant", "Shape", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Size", "ConstantOfShape"}
# The inspector's two spellings of a tensor's type: of plain layers, and of those that Myelin makes.
_LONG = {
    "FP32": "Row major linear FP32",
    "FP16": "Row major linear FP16 format",
    "BF16": "Row major linear BF16 format",
}
_LONG |= {"INT8": "Four wide channel vectorized row major Int8 format", "FP8": "Row major linear FP8 format"}
_LONG |= {"INT32": "Row major Int32 tensor", "INT64": "Row major Int64 tensor", "BOOL": "Row major Bool tensor"}
_SHORT = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "FP8": "FP8", "FP4": "FP4"}
_SHORT |= {"INT32": "Int32", "INT64": "Int64", "BOOL": "Bool"}
_TACTICS = {"FP32": "f32f32_tf32f32_f32", "FP16": "f16f16_f16f32_f16", "INT8": "i8i8_i8i32_f32"}
_TACTICS |= {"FP8": "e4m3e4m3_e4m3f32_f32", "FP4": "e2m1e2m1_f32_f32", "BF16": "bf16bf16_bf16f32_bf16"}


def derive(graph: OnnxGraph, *, strong: bool, flags: list[str], wanted: dict[str, str]) -> list[dict[str, Any]]:
    """The kernels in order. `wanted` are the precisions that a user set on layers of a weakly typed network."""
    producers, consumers = graph.producers, graph.consumers
    outputs = {port.name for port in graph.outputs}
    taken: set[int] = set()
    found: dict[int, dict[str, Any]] = {}
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    for index, node in enumerate(graph.nodes):
        if node.operator not in PRODUCTS:
            continue
        fused, low = [], []
        for name in node.inputs[:2]:
            dq = producers.get(name)
            if dq is None or dq.operator != "DequantizeLinear":
                low.append(None)
                continue
            low.append(_LOW.get(graph.types[dq.inputs[0]]))
            if all(user.operator in PRODUCTS or _sums_skip(user, producers) for user in consumers[name]):
                taken.add(place[id(dq)])
                fused.append(dq)
            quantizer = producers.get(dq.inputs[0])
            if quantizer is not None and quantizer.inputs[0] in graph.weights:
                taken.add(place[id(quantizer)])
                fused.append(quantizer)
        taken.add(index)
        float_type = _FLOAT.get(graph.types.get(node.outputs[0], "FLOAT"), "FP32")
        kinds = set(low)
        quantized = len(low) == 2 and None not in kinds and len(kinds) == 1
        chain = _tail(node, graph, producers, consumers, outputs)
        for other in chain:
            skips = [producers[name] for name in other.inputs if name in producers and _sums_skip(other, producers)]
            fused += [dq for dq in skips if dq.operator == "DequantizeLinear" and place[id(dq)] not in taken]
        taken.update(place[id(dq)] for dq in fused)
        taken.update(place[id(other)] for other in chain)
        precision = str(low[0]) if quantized else float_type
        if not strong:
            precision = _weak(node, precision, float_type, flags, wanted)
        found[index] = {"nodes": [*fused, node, *chain], "main": node, "precision": precision, "float": float_type}
    rest = _rest(graph, taken, consumers)
    found.update(rest)
    kernels = [_kernel(graph, entry, number) for number, (_, entry) in enumerate(sorted(found.items()))]
    return _with_reformats(graph, kernels)


def _weak(node: Node, precision: str, float_type: str, flags: list[str], wanted: dict[str, str]) -> str:
    """A weakly typed builder takes the fastest precision that the flags allow, unless it is held to another."""
    obeys = {"OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"} & set(flags)
    if precision in ("INT8", "FP8", "FP4"):
        return precision if precision in flags else float_type
    if obeys and node.name in wanted:
        return _FLOAT.get(wanted[node.name], wanted[node.name])
    return "FP16" if "FP16" in flags else "BF16" if "BF16" in flags else "FP32"


def _tail(
    node: Node, graph: OnnxGraph, producers: dict[str, Node], consumers: dict[str, list[Node]], outputs: set[str]
) -> list[Node]:
    """The bias, activation and quantizer behind a product that one kernel does with it."""
    chain: list[Node] = []
    last = node
    for allowed in ({"Add"}, _ACTIVATIONS, {"QuantizeLinear"}):
        users = consumers.get(last.outputs[0], [])
        if last.outputs[0] in outputs or len(users) != 1 or users[0].operator not in allowed:
            continue
        adds_bias = any(name in graph.weights for name in users[0].inputs)
        if users[0].operator == "Add" and not adds_bias and not _sums_skip(users[0], producers):
            continue
        last = users[0]
        chain.append(last)
    return chain


def _sums_skip(node: Node, producers: dict[str, Node]) -> bool:
    """Whether this is the residual sum of a convolution and a dequantized skip, which one kernel does."""
    makers = [producers[name].operator for name in node.inputs if name in producers]
    return node.operator == "Add" and sorted(makers) == ["Conv", "DequantizeLinear"]


def _rest(graph: OnnxGraph, taken: set[int], consumers: Any) -> dict[int, dict[str, Any]]:
    """Kernels of what is no product: neighbours that feed each other are one, Q and DQ stand alone."""
    found: dict[int, dict[str, Any]] = {}
    open_at: int | None = None
    for index, node in enumerate(graph.nodes):
        if index in taken or node.operator in _FREE:
            continue
        if not any(name and name not in graph.weights for name in node.inputs):
            continue  # folded
        kind = graph.types.get(node.outputs[0], "FLOAT")
        precision = _FLOAT.get(kind, _LOW.get(kind, kind))
        alone = node.operator in ("QuantizeLinear", "DequantizeLinear")
        entry = None if open_at is None else found[open_at]
        if entry and not alone and entry["nodes"][-1].outputs[0] in node.inputs and entry["precision"] == precision:
            entry["nodes"].append(node)
            continue
        found[index] = {"nodes": [node], "main": None, "precision": precision, "float": precision}
        open_at = None if alone else index
    return found


def _kernel(graph: OnnxGraph, entry: dict[str, Any], number: int) -> dict[str, Any]:
    nodes: list[Node] = entry["nodes"]
    main: Node | None = entry["main"]
    precision = entry["precision"]
    made = {name for node in nodes for name in node.outputs}
    weights = [name for node in nodes for name in node.inputs if name in graph.weights]
    big = max((graph.weights[name] for name in weights), key=lambda weight: weight.count, default=None)
    inputs = [name for node in nodes for name in node.inputs if name and name not in made and name not in weights]
    outputs = [name for name in nodes[-1].outputs if name]
    if main is not None and main.operator in ("Conv", "ConvTranspose"):
        kind = "CaskConvolution" if main.operator == "Conv" else "CaskDeconvolution"
        named = [big.name] if big is not None and len(nodes) > 1 and nodes[0] is not main else []
        name = " + ".join([*named, *(node.name for node in nodes)])
    elif main is not None:
        kind = "gemm"
        words = "".join(
            {"MatMul": "Fc", "Gemm": "Fc"}.get(n.operator, n.operator)
            for n in nodes
            if "quant" not in n.operator.lower()
        )
        name = f"{main.name}_myl0_{number}" if len(nodes) == 1 else f"__myl_{words}_myl0_{number}"
    elif nodes[0].operator in ("QuantizeLinear", "DequantizeLinear"):
        kind, name = "Reformat", nodes[0].name
    else:
        kind, name = "kgen", f"__myl_{''.join(node.operator for node in nodes)[:60]}_myl0_{number}"
    low = main is not None and precision in ("INT8", "FP8", "FP4")

    def taken(tensor: str) -> str:
        return precision if low else _shown(graph, tensor, entry["float"])

    def given(tensor: str) -> str:
        kind = graph.types.get(tensor, "FLOAT")
        return _LOW[kind] if kind in _LOW else _shown(graph, tensor, entry["float"])

    return {
        "name": name,
        "type": kind,
        "precision": precision,
        "onnx": [node.name for node in nodes],
        "inputs": [[tensor, taken(tensor)] for tensor in dict.fromkeys(inputs)],
        "outputs": [[tensor, given(tensor)] for tensor in outputs],
        "weights": 0 if big is None or main is None else big.count,
        "graph_weight_type": "" if big is None else big.type,
    }  # fmt: skip


def _shown(graph: OnnxGraph, tensor: str, precision: str) -> str:
    """The precision that a tensor has in a kernel of this precision: its own unless it is a float."""
    kind = graph.types.get(tensor, "FLOAT")
    own = _LOW.get(kind, kind)
    return own if kind not in _FLOAT else precision if precision in _FLOAT.values() else _FLOAT[kind]


def _with_reformats(graph: OnnxGraph, kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, and copies between layouts where a convolution of low precision meets an input or an output."""
    inputs = {port.name for port in graph.inputs}
    outputs = {port.name for port in graph.outputs}
    full: list[dict[str, Any]] = []
    for kernel in kernels:
        product = kernel["type"] in ("CaskConvolution", "CaskDeconvolution")
        if product and kernel["inputs"] and kernel["inputs"][0][0] in inputs and kernel["precision"] != "FP32":
            full.append(_copy(f"Reformatting CopyNode for Input Tensor 0 to {kernel['name']}", kernel["inputs"][0]))
        full.append(kernel)
        if product and kernel["outputs"][0][0] in outputs and kernel["precision"] != "FP32":
            full.append(_copy(f"Reformatting CopyNode for Output Tensor 0 to {kernel['name']}", kernel["outputs"][0]))
    return full


def _copy(name: str, tensor: list[str]) -> dict[str, Any]:
    return {
        "name": name, "type": "Reformat", "precision": tensor[1], "onnx": [], "inputs": [[tensor[0], "FP32"]],
        "outputs": [tensor], "weights": 0, "graph_weight_type": "",
    }  # fmt: skip


def weight_bytes(graph: OnnxGraph, kernels: list[dict[str, Any]]) -> int:
    """Bytes of the weights as kernels keep them: those of an INT8 product take a byte each."""
    bits = {"INT8": 8, "FP8": 8, "FP4": 4, "FP16": 16, "BF16": 16, "FP32": 32}
    total = sum(weight.size for weight in graph.weights.values())
    for kernel in kernels:
        if kernel["weights"]:
            before = BITS.get(kernel["graph_weight_type"], 32)
            total -= kernel["weights"] * (before - bits[kernel["precision"]]) // 8
    return max(total, 0)


def activation_bytes(graph: OnnxGraph) -> int:
    """Scratch memory: a few times what goes in and out; a dynamic dimension counts as one."""
    total = 0
    for port in (*graph.inputs, *graph.outputs):
        count = 1
        for size in port.shape:
            count *= size if isinstance(size, int) else 1
        total += count * BITS.get(port.type, 32) // 8
    return 4 * -(-total // 512) * 512


def document(header: dict[str, Any], lane: str, *, ignored: bool) -> dict[str, Any]:
    """The inspector's JSON in the form of a lane; with `ignored` every layer says FP32."""
    detailed, none = header["verbosity"] == "DETAILED", header["verbosity"] == "NONE"
    kernels = [] if none else header["layers"]
    told: list[Any] = [layer(kernel, lane, ignored=ignored) if detailed else kernel["name"] for kernel in kernels]
    names = [entry[0] for entry in (*header["inputs"], *header["outputs"])]
    if not lane.startswith("11"):
        return {"Layers": told, "Bindings": names}
    tensors = []
    for mode in ("inputs", "outputs"):
        for name, kind, shape in header[mode]:
            tensors.append(
                {
                    "Name": name,
                    "IOMode": mode[:-1].capitalize(),
                    "DataType": _SHORT.get(_FLOAT.get(kind, kind), kind),
                    "Dimensions": [size if isinstance(size, int) else -1 for size in shape],
                    "Location": "Device",
                }
            )
    return {
        "Layers": told,
        "I/O Tensors": tensors,
        "ProfilingVerbosity": header["verbosity"],
        "Engine Metadata": {"Multi-Device": "Disabled"},
    }


def layer(kernel: dict[str, Any], lane: str, *, ignored: bool) -> dict[str, Any]:
    """One detailed layer."""
    myelin = kernel["type"] in ("gemm", "kgen")
    spelling = _SHORT if myelin or lane.startswith("11") else _LONG
    precision = "FP32" if ignored else kernel["precision"]

    def tensors(side: str) -> list[dict[str, Any]]:
        shown = [
            [name, "FP32" if ignored and kind in _SHORT and kind not in ("INT32", "INT64", "BOOL") else kind]
            for name, kind in kernel[side]
        ]
        return [
            {"Name": name, "Location": "Device", "Dimensions": [], "Format/Datatype": spelling.get(kind, kind)}
            for name, kind in shown
        ]

    separator = "\x1e" if lane == "10.3" else "\x1f"
    told: dict[str, Any] = {
        "Name": kernel["name"],
        "LayerType": kernel["type"],
        "Inputs": tensors("inputs"),
        "Outputs": tensors("outputs"),
    }
    if kernel["weights"]:
        told["Weights"] = {"Type": _SHORT[precision], "Count": kernel["weights"]}
    word = "gemm" if kernel["type"] == "gemm" else "fprop_implicit_gemm" if kernel["weights"] else ""
    told["TacticName"] = f"sm80_xmma_{word}_{_TACTICS.get(precision, 'f32')}_tn" if word else "0x00000000000003e8"
    told["StreamId"] = 0
    told["Metadata"] = separator.join(f"[ONNX Layer: {name}]" for name in kernel["onnx"])
    return told
