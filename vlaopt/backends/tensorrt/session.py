"""One TensorRT engine, opened: one context, one stream, buffers that stay. The module that made it is passed in."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlaopt.backends import Euler, Port, Resident, Value, check_feeds
from vlaopt.backends.tensorrt.cuda import Buffer, Capture, Stream
from vlaopt.backends.tensorrt.log import Log, collector
from vlaopt.backends.tensorrt.whole_loop import Step, WholeLoop, queue, said
from vlaopt.errors import EnvironmentProblem, InputError, StageError

_BACKEND = "tensorrt"
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
}
_OF_ML_DTYPES = ("BF16", "FP8")

Range = tuple[tuple[int, ...], tuple[int, ...]]
"""The smallest and the largest shape that an input may have."""


class TensorRtSession:
    """A component run by TensorRT; one thread at a time.

    With `cuda_graph` a run is one launch of what its first run queued, where CUDA can capture that. An engine with
    dynamic dimensions has buffers for the largest shapes of its profile, and no CUDA graph. `cache` is a folder where
    the small engine of a whole loop is kept.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        context: Any,
        stream: Stream,
        *,
        cuda_graph: bool = False,
        log: Log | None = None,
        cache: Path | None = None,
    ) -> None:
        self._trt = trt
        self._engine = engine  # a context must not outlive its engine
        self._context = context
        self._stream = stream
        self._log = log
        self._cache = cache
        self._busy = threading.Lock()
        self._inputs: tuple[Port, ...] = ()
        self._outputs: tuple[Port, ...] = ()
        self._ranges: dict[str, Range] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, Buffer] = {}
        self._held: dict[str, Resident] = {}
        self._graph: Capture | None = None
        self._graph_wanted = cuda_graph
        self._loops: dict[Euler, WholeLoop | None] | None = {} if cuda_graph else None
        self._told: dict[str, str] = {}
        try:
            self._bind()
        except BaseException:
            stream.close()
            raise

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    @property
    def told(self) -> tuple[str, ...]:
        """How it runs, once it ran: as a CUDA graph, or why not though it was asked for; a loop likewise."""
        return tuple(self._told.values())

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Copies of the outputs by name. Raises InputError for wrong feeds, StageError when TensorRT refuses to run.

        A resident output is this session's device buffer. The session that takes it copies it, on the device, into
        its own once, however often it runs with it: addresses that change would cost a CUDA graph its capture.
        """
        with self._alone():
            check_feeds(self._inputs, feeds, _BACKEND)
            if self._ranges:
                self._reshape(feeds)
            for port in self._inputs:
                self._take(port.name, feeds[port.name])
            self._execute()
            return self._outcome(resident)

    def integrate(
        self, feeds: Mapping[str, Value], euler: Euler, noise: np.ndarray, resident: Collection[str] = ()
    ) -> tuple[np.ndarray, dict[str, Any]] | None:
        """As `vlaopt.backends.Integrating` says; None without `cuda_graph`, and where the loop cannot be queued whole.

        Raises InputError and StageError as `run` does.
        """
        if self._loops is None:
            return None
        with self._alone():
            ports = [port for port in self._inputs if port.name not in (euler.state, euler.time)]
            check_feeds(ports, feeds, _BACKEND)
            if euler not in self._loops:
                self._loops[euler] = self._whole_loop(euler)
            loop = self._loops[euler]
            if loop is None:
                return None
            for name in (euler.state, euler.time):
                self._held.pop(name, None)
            for port in ports:
                self._take(port.name, feeds[port.name])
            state = loop.run(noise).copy()
            self._told["loop"] = loop.told
            return state, self._outcome(resident)

    def close(self) -> None:
        """Free what the session holds; it cannot run any more. Happens by itself when nobody has the session."""
        with self._alone():
            self._buffers.clear()
            self._held.clear()
            self._graph = self._loops = self._context = self._engine = None
            self._stream.close()

    def _bind(self) -> None:
        """Read the ports, make the buffers, for the largest shapes, and tell the context of them."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        mode = self._trt.TensorIOMode
        self._inputs = tuple(_port(self._engine, name) for name in names if modes[name] == mode.INPUT)
        self._outputs = tuple(_port(self._engine, name) for name in names if modes[name] == mode.OUTPUT)
        self._ranges = {port.name: _profile(self._engine, port.name) for port in self._inputs if -1 in port.shape}
        self._shapes = {port.name: port.shape for port in (*self._inputs, *self._outputs)}
        self._set_shapes({name: most for name, (_, most) in self._ranges.items()})
        for port in (*self._inputs, *self._outputs):
            buffer = self._buffers[port.name] = self._stream.buffer(self._shapes[port.name], port.dtype)
            if not self._context.set_tensor_address(port.name, buffer.device):
                raise StageError(f"TensorRT refuses the address of tensor {port.name!r}{said(self._log)}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise InputError(
                "a TensorRT session is used by two threads at once", hint="open the policy once in each thread"
            )
        try:
            if self._context is None:
                raise InputError("the TensorRT session is closed")
            yield
        finally:
            self._busy.release()

    def _execute(self) -> None:
        if self._graph:
            self._graph.launch()
            return
        self._enqueue()
        if self._graph_wanted:
            self._graph_wanted = False
            self._told["component"] = self._capture()

    def _whole_loop(self, euler: Euler) -> WholeLoop | None:
        if self._ranges:
            self._told["loop"] = "the loop step by step: shapes are dynamic"
            return None
        state, time, velocity = (self._buffers[name] for name in (euler.state, euler.time, euler.velocity))
        # Not a method of this session: it would hold the session, which holds the loop, for ever.
        step = Step(
            state, time, velocity, functools.partial(queue, self._context, self._stream, self._log, "run the engine")
        )
        try:
            return WholeLoop(self._trt, self._log or collector(self._trt), self._stream, step, euler, self._cache)
        except (EnvironmentProblem, StageError) as error:
            self._told["loop"] = f"the loop step by step: {error.message}"
            return None

    def _outcome(self, resident: Collection[str]) -> dict[str, Any]:
        for port in self._outputs:
            if port.name not in resident:
                self._stream.download(self._buffers[port.name], self._shapes[port.name])
        self._stream.wait()
        return {port.name: self._given(port, port.name in resident) for port in self._outputs}

    def _capture(self) -> str:
        if self._ranges:
            return "without a CUDA graph: its shapes are dynamic"
        self._stream.wait()
        try:
            self._graph = self._stream.capture(self._enqueue)
        except (EnvironmentProblem, StageError) as error:
            return f"without a CUDA graph: {error.message}"
        return "as a CUDA graph"

    def _enqueue(self) -> None:
        queue(self._context, self._stream, self._log, "run the engine")

    def _take(self, name: str, value: Value) -> None:
        buffer = self._buffers[name]
        if not isinstance(value, Resident):
            self._held.pop(name, None)
            np.copyto(buffer.view(value.shape), value)
            self._stream.upload(buffer, value.shape)
        elif self._held.get(name) is not value:
            self._stream.copy(value.value, buffer, value.shape)
            self._held[name] = value

    def _given(self, port: Port, stays: bool) -> Any:
        buffer, shape = self._buffers[port.name], self._shapes[port.name]
        return Resident(_BACKEND, port.dtype, shape, buffer) if stays else buffer.view(shape).copy()

    def _reshape(self, feeds: Mapping[str, Value]) -> None:
        shapes = {name: feeds[name].shape for name in self._ranges}
        for name, (least, most) in self._ranges.items():
            for index, (size, low, high) in enumerate(zip(shapes[name], least, most, strict=True)):
                if not low <= size <= high:
                    raise InputError(
                        f"dimension {index} of input {name!r} is {size}; the engine was built for {low} to {high}",
                        hint="widen it in engine.tensorrt.profiles and build again",
                    )
        if any(self._shapes[name] != shape for name, shape in shapes.items()):
            self._set_shapes(shapes)
            for port in self._outputs:
                if np.prod(self._shapes[port.name]) > self._buffers[port.name].host.size:
                    raise StageError(f"output {port.name!r} is larger than at the largest shapes of the profile")

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tell the context the shapes of its dynamic inputs, and learn from it those of the outputs."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise StageError(f"TensorRT refuses the shape {shape} of input {name!r}{said(self._log)}")
        self._shapes |= shapes
        for port in self._outputs if shapes else ():
            shape = tuple(int(size) for size in self._context.get_tensor_shape(port.name))
            if any(size < 0 for size in shape):
                raise InputError(f"the shape of output {port.name!r} depends on what is in the inputs")
            self._shapes[port.name] = shape


def _port(engine: Any, name: str) -> Port:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES or (kind in _OF_ML_DTYPES and not _has_ml_dtypes()):
        raise InputError(f"tensor {name!r} is {kind}, which numpy cannot hold", hint="cast it inside the graph")
    return Port(name, _DTYPES[kind], tuple(int(size) for size in engine.get_tensor_shape(name)))


def _has_ml_dtypes() -> bool:
    """Whether numpy knows bfloat16 and float8 by their names: importing ml_dtypes teaches it."""
    try:
        importlib.import_module("ml_dtypes")
    except ImportError:
        return False
    return True


def _profile(engine: Any, name: str) -> Range:
    """What the engine's only profile allows."""
    least, _, most = engine.get_tensor_profile_shape(name, 0)
    return tuple(int(size) for size in least), tuple(int(size) for size in most)
