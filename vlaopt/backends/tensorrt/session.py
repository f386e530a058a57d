"""One TensorRT engine, opened: static shapes, one context, one stream. The module that made it is passed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlaopt.backends import Port, check_feeds
from vlaopt.backends.tensorrt.cuda import Stream
from vlaopt.errors import InputError, StageError

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class TensorRtSession:
    """A component run by TensorRT; one thread at a time."""

    def __init__(self, trt: Any, engine: Any, context: Any, stream: Stream) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self._engine = engine  # a context must not outlive its engine
        self._context = context
        self._stream = stream
        self._inputs = tuple(_port(engine, name) for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self._outputs = tuple(_port(engine, name) for name in names if modes[name] == trt.TensorIOMode.OUTPUT)
        ports = (*self._inputs, *self._outputs)
        self._buffers = {port.name: stream.buffer(port.shape, port.dtype) for port in ports}
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise StageError(f"TensorRT refuses the address of tensor {name!r}")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copies of the outputs by name. Raises InputError for wrong feeds, StageError when TensorRT refuses to run."""
        check_feeds(self._inputs, feeds)
        for port in self._inputs:
            buffer = self._buffers[port.name]
            np.copyto(buffer.host, feeds[port.name])
            self._stream.upload(buffer)
        if not self._context.execute_async_v3(self._stream.handle):
            raise StageError("TensorRT refused to run the engine")
        for port in self._outputs:
            self._stream.download(self._buffers[port.name])
        self._stream.wait()
        return {port.name: self._buffers[port.name].host.copy() for port in self._outputs}


def _port(engine: Any, name: str) -> Port:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise InputError(f"tensor {name!r} is {kind}, which numpy cannot hold", hint="cast it inside the graph")
    shape = tuple(int(size) for size in engine.get_tensor_shape(name))
    if any(size < 0 for size in shape):
        raise InputError(f"tensor {name!r} has the dynamic shape {shape}", hint="export it with static shapes")
    return Port(name, _DTYPES[kind], shape)
