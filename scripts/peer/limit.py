"""How fast this machine multiplies 8-bit matrices: square products in the libraries that are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peer.subjects import Calls

SIZES = (1024, 2048)
"""Of the matrices: one that fits into the caches of a core or two, and one that does not."""


class Products(Calls):
    """Sample i is a product of uint8 and int8 matrices of size `SIZES[i]`; `macs[i]` are its multiply-adds."""

    macs = tuple(size**3 for size in SIZES)
    count = len(SIZES)

    def __init__(self, make: Callable[[np.ndarray, np.ndarray, int], Callable[[], Any]], threads: int) -> None:
        random = np.random.default_rng(0)
        self._products = []
        for size in SIZES:
            left = random.integers(0, 255, (size, size)).astype(np.uint8)
            # Of 7 bits, which every way of multiplying them takes without saturating.
            right = random.integers(-63, 63, (size, size)).astype(np.int8)
            self._products.append(make(left, right, threads))

    def call(self, sample: int) -> Any:
        return self._products[sample % self.count]()


def _onnxruntime(left: np.ndarray, right: np.ndarray, threads: int) -> Callable[[], Any]:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = _model(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])],
        [numpy_helper.from_array(right, "right")],
        (TensorProto.UINT8, TensorProto.INT32),
        len(left),
    )
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def _openvino(left: np.ndarray, right: np.ndarray, threads: int) -> Callable[[], Any]:
    import openvino as ov
    from onnx import TensorProto, helper, numpy_helper

    values = {"scale": np.float32(0.01), "middle": np.uint8(128), "zero": np.int8(0), "right": right}
    nodes = [
        helper.make_node("QuantizeLinear", ["left", "scale", "middle"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "middle"], ["a"]),
        helper.make_node("DequantizeLinear", ["right", "scale", "zero"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["product"]),
    ]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    model = _model(nodes, weights, (TensorProto.FLOAT, TensorProto.FLOAT), len(left))
    core = ov.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    real = (left.astype(np.float32) - 128) * np.float32(0.01)
    return lambda: request.infer({0: real}, share_inputs=True, share_outputs=True)


def _torch(engine: str) -> Callable[[np.ndarray, np.ndarray, int], Callable[[], Any]]:
    def make(left: np.ndarray, right: np.ndarray, threads: int) -> Callable[[], Any]:
        import warnings

        import torch

        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors go to another package one day
            weight = torch.quantize_per_tensor(torch.from_numpy(right.astype(np.float32)), 1.0, 0, torch.qint8)
            given = torch.quantize_per_tensor(torch.from_numpy(left.astype(np.float32)), 1.0, 0, torch.quint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        return lambda: torch.ops.quantized.linear(given, packed, 1.0, 0)

    return make


def _model(nodes: list[Any], weights: list[Any], types: tuple[int, int], size: int) -> bytes:
    from onnx import helper

    ports = [
        helper.make_tensor_value_info(name, kind, [size, size])
        for name, kind in zip(("left", "product"), types, strict=True)
    ]
    graph = helper.make_graph(nodes, "product", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    encoded: bytes = model.SerializeToString()
    return encoded


LIMITS: Mapping[str, tuple[str, Callable[[np.ndarray, np.ndarray, int], Callable[[], Any]]]] = {
    "limit-onnxruntime": ("ONNX Runtime MatMulInteger", _onnxruntime),
    "limit-openvino": ("OpenVINO quantized MatMul", _openvino),
    "limit-fbgemm": ("torch quantized linear, FBGEMM", _torch("fbgemm")),
    "limit-onednn": ("torch quantized linear, oneDNN", _torch("onednn")),
}
