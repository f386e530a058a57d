"""One TensorRT engine, opened: static shapes, one context, one stream. The module that made it is passed in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vlaopt.backends import Port, Resident, Value, check_feeds
from vlaopt.backends.tensorrt.cuda import Stream
from vlaopt.errors import InputError, StageError

_BACKEND = "tensorrt"
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
        self._held: dict[str, Resident] = {}
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise StageError(f"TensorRT refuses the address of tensor {name!r}")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Copies of the outputs by name. Raises InputError for wrong feeds, StageError when TensorRT refuses to run.

        A resident output is this session's device buffer. The session that takes it copies it, on the device, into
        its own once, however often it runs with it: addresses that change would cost a CUDA graph its capture.
        """
        check_feeds(self._inputs, feeds, _BACKEND)
        for port in self._inputs:
            self._take(port.name, feeds[port.name])
        if not self._context.execute_async_v3(self._stream.handle):
            raise StageError("TensorRT refused to run the engine")
        for port in self._outputs:
            if port.name not in resident:
                self._stream.download(self._buffers[port.name])
        self._stream.wait()
        given: dict[str, Any] = {}
        for port in self._outputs:
            buffer = self._buffers[port.name]
            stays = port.name in resident
            given[port.name] = Resident(_BACKEND, port.dtype, port.shape, buffer) if stays else buffer.host.copy()
        return given

    def _take(self, name: str, value: Value) -> None:
        buffer = self._buffers[name]
        if not isinstance(value, Resident):
            self._held.pop(name, None)
            np.copyto(buffer.host, value)
            self._stream.upload(buffer)
        elif self._held.get(name) is not value:
            self._stream.copy(value.value, buffer)
            self._held[name] = value


def _port(engine: Any, name: str) -> Port:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise InputError(f"tensor {name!r} is {kind}, which numpy cannot hold", hint="cast it inside the graph")
    shape = tuple(int(size) for size in engine.get_tensor_shape(name))
    if any(size < 0 for size in shape):
        raise InputError(f"tensor {name!r} has the dynamic shape {shape}", hint="export it with static shapes")
    return Port(name, _DTYPES[kind], shape)
