"""A backend for tests, as third parties plug in: it takes quantized graphs and calculates in FP32 all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Session, onnxruntime


@dataclass
class IgnoresInt8(onnxruntime.OnnxRuntimeBackend):
    """ONNX Runtime, told to drop all quantizers as it opens a graph. It may name its layers or only count them."""

    name: str = "ignores-int8"
    names_layers: bool = True

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        with _quantizers_dropped():
            engine = super().build(graph, options)
        return engine if self.names_layers else replace(engine, layers={})

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        with _quantizers_dropped():
            return super().open(files, options)


@contextmanager
def _quantizers_dropped() -> Iterator[None]:
    with (
        mock.patch.object(onnxruntime, "_eight_bit", return_value=False),
        mock.patch.object(onnxruntime, "_optimise", lambda graph: graph.model),
    ):
        yield


BACKEND = IgnoresInt8()
