"""One TensorRT engine, opened: one context, one stream, buffers that stay. The module that made it is passed in."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlaopt.backends import DeviceTime, Euler, Link, Port, Resident, Value, check_feeds
from vlaopt.backends.tensorrt.chain import BACKEND, Chain
from vlaopt.backends.tensorrt.cuda import Buffer, Capture, Stream
from vlaopt.backends.tensorrt.log import Log, collector
from vlaopt.backends.tensorrt.ports import Range, port_of, profile_of
from vlaopt.backends.tensorrt.whole_loop import Step, WholeLoop, queue, said
from vlaopt.errors import EnvironmentProblem, InputError, StageError


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
        self.stream = stream
        self._log = log
        self._cache = cache
        self._busy = threading.Lock()
        self._inputs: tuple[Port, ...] = ()
        self._outputs: tuple[Port, ...] = ()
        self._ranges: dict[str, Range] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, Buffer] = {}
        self._held: dict[str, Resident] = {}
        self._graph: Capture | None = None
        self._graph_wanted = cuda_graph
        self._chains: dict[tuple[Link, ...], Chain | None] | None = {} if cuda_graph else None
        self._told: dict[str, str] = {}
        self._events: tuple[Any, ...] = ()
        self._times: list[DeviceTime] | None = None
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
        """How it runs, once it ran: as a CUDA graph, or why not though it was asked for; in a chain likewise."""
        return tuple(self._told.values())

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Copies of the outputs by name. Raises InputError for wrong feeds, StageError when TensorRT refuses to run.

        A resident output is this session's device buffer. The session that takes it copies it, on the device, into
        its own once, however often it runs with it: addresses that change would cost a CUDA graph its capture.
        """
        with self.alone():
            check_feeds(self._inputs, feeds, BACKEND)
            if self._ranges:
                self._reshape(feeds)
            if self._times is not None:
                self._times.append(self._timed(feeds, resident))
                return self.outcome(resident)
            for port in self._inputs:
                self.take(port.name, feeds[port.name], self.stream)
            self._execute()
            self.fetch(resident, self.stream)
            self.stream.wait()
            return self.outcome(resident)

    @contextmanager
    def device_times(self) -> Iterator[Sequence[DeviceTime]]:
        """As `vlaopt.backends.Timing` says, by CUDA events. Raises EnvironmentProblem where CUDA makes none."""
        with self.alone():
            self._events = self._events or tuple(self.stream.event() for _ in range(4))
        times = self._times = []
        try:
            yield times
        finally:
            self._times = None

    def chain(
        self, links: tuple[Link, ...], tensors: Mapping[str, Value], noise: np.ndarray | None
    ) -> dict[str, Any] | None:
        """As `vlaopt.backends.Chaining` says; None without `cuda_graph` too, and for one component without a loop."""
        looped = any(link.euler for link in links)
        if self._chains is None or (looped and noise is None) or not (looped or len(links) > 1):
            return None
        if links not in self._chains:
            self._chains[links] = self._chained(links)
        chain = self._chains[links]
        if chain is None:
            return None
        outcome = chain.run(tensors, noise)
        for session in chain.sessions:
            session._told[chain.label] = f"{chain.told}: {chain.label}"
        return outcome

    def close(self) -> None:
        """Free what the session holds; it cannot run any more. Happens by itself when nobody has the session."""
        with self.alone():
            self.buffers.clear()
            self._held.clear()
            self._events = ()
            self._graph = self._chains = self._context = self._engine = None
            self.stream.close()

    # For chains: what `run` is made of.

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises InputError while another thread is inside, and where the session is closed."""
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

    @property
    def dynamic(self) -> bool:
        """Whether any dimension is."""
        return bool(self._ranges)

    def take(self, name: str, value: Value, stream: Stream) -> None:
        """Queue the copy of an input into its buffer, once for a resident however often it comes."""
        self._stage(name, value)
        self._send(name, value, stream)

    def forget(self) -> None:
        """The inputs' buffers are written by others: a resident taken before is not there any more."""
        self._held.clear()

    def enqueue(self, stream: Stream) -> None:
        """Put one run on a stream. Raises StageError when TensorRT refuses."""
        queue(self._context, stream, self._log, "run the engine")

    def fetch(self, resident: Collection[str], stream: Stream) -> None:
        """Queue the copies of the outputs to the host."""
        for port in self._outputs:
            if port.name not in resident:
                stream.download(self.buffers[port.name], self._shapes[port.name])

    def outcome(self, resident: Collection[str]) -> dict[str, Any]:
        """The outputs by name, once the stream is done."""
        return {port.name: self._given(port, port.name in resident) for port in self._outputs}

    def whole_loop(self, stream: Stream, euler: Euler) -> WholeLoop:
        """All steps of a loop over this component. Raises StageError and EnvironmentProblem where that cannot be."""
        state, time, velocity = (self.buffers[name] for name in (euler.state, euler.time, euler.velocity))
        step = Step(state, time, velocity, functools.partial(self.enqueue, stream))
        return WholeLoop(self._trt, self._log or collector(self._trt), stream, step, euler, self._cache)

    def _bind(self) -> None:
        """Read the ports, make the buffers, for the largest shapes, and tell the context of them."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        mode = self._trt.TensorIOMode
        self._inputs = tuple(port_of(self._engine, name) for name in names if modes[name] == mode.INPUT)
        self._outputs = tuple(port_of(self._engine, name) for name in names if modes[name] == mode.OUTPUT)
        self._ranges = {port.name: profile_of(self._engine, port.name) for port in self._inputs if -1 in port.shape}
        self._shapes = {port.name: port.shape for port in (*self._inputs, *self._outputs)}
        self._set_shapes({name: most for name, (_, most) in self._ranges.items()})
        for port in (*self._inputs, *self._outputs):
            buffer = self.buffers[port.name] = self.stream.buffer(self._shapes[port.name], port.dtype)
            if not self._context.set_tensor_address(port.name, buffer.device):
                raise StageError(f"TensorRT refuses the address of tensor {port.name!r}{said(self._log)}")

    def _stage(self, name: str, value: Value) -> None:
        """An array into its buffer's memory on the host."""
        if not isinstance(value, Resident):
            np.copyto(self.buffers[name].view(value.shape), value)

    def _send(self, name: str, value: Value, stream: Stream) -> None:
        """Queue the copy of what was staged, or of a resident that the buffer does not hold yet."""
        buffer = self.buffers[name]
        if not isinstance(value, Resident):
            self._held.pop(name, None)
            stream.upload(buffer, value.shape)
        elif self._held.get(name) is not value:
            stream.copy(value.value, buffer, value.shape)
            self._held[name] = value

    def _execute(self) -> None:
        self._launch()
        if self._graph_wanted:
            self._graph_wanted = False
            self._told["component"] = self._capture()

    def _launch(self) -> None:
        if self._graph:
            self._graph.launch()
        else:
            self.enqueue(self.stream)

    def _timed(self, feeds: Mapping[str, Value], resident: Collection[str]) -> DeviceTime:
        """A run between events. All arrays are staged first: the device would wait, and its clock count, for each."""
        began, sent, ran, fetched = self._events
        for name, value in feeds.items():
            self._stage(name, value)
        self.stream.record(began)
        for name, value in feeds.items():
            self._send(name, value, self.stream)
        self.stream.record(sent)
        self._launch()
        self.stream.record(ran)
        self.fetch(resident, self.stream)
        self.stream.record(fetched)
        self.stream.wait()
        elapsed_ms = self.stream.elapsed_ms
        return DeviceTime(elapsed_ms(sent, ran), elapsed_ms(began, sent) + elapsed_ms(ran, fetched))

    def _chained(self, links: tuple[Link, ...]) -> Chain | None:
        sessions = tuple(link.session for link in links if isinstance(link.session, TensorRtSession))
        if len(sessions) < len(links):
            return None
        try:
            with self.alone():
                return Chain(links, sessions)
        except (EnvironmentProblem, StageError) as error:
            names = ", ".join(link.name for link in links)
            self._told[names] = f"one by one: {names}: {error.message}"
            return None

    def _capture(self) -> str:
        if self._ranges:
            return "without a CUDA graph: its shapes are dynamic"
        self.stream.wait()
        try:
            self._graph = self.stream.capture(functools.partial(self.enqueue, self.stream))
        except (EnvironmentProblem, StageError) as error:
            return f"without a CUDA graph: {error.message}"
        return "as a CUDA graph"

    def _given(self, port: Port, stays: bool) -> Any:
        buffer, shape = self.buffers[port.name], self._shapes[port.name]
        return Resident(BACKEND, port.dtype, shape, buffer) if stays else buffer.view(shape).copy()

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
            if np.prod(self._shapes[port.name]) > self.buffers[port.name].host.size:
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
