"""All steps of an euler loop queued at once: state and velocity never leave the device.

The state is accumulated in float32 outside the step's engine, as `vlaopt.runtime.loop` does it on the host: a second,
tiny engine, made here with TensorRT's own network, adds the step's velocity to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlaopt.backends import Euler
from vlaopt.backends.kept import keep, recall
from vlaopt.backends.tensorrt.building import platform_name
from vlaopt.backends.tensorrt.cuda import Buffer, Stream
from vlaopt.backends.tensorrt.log import Log, reason
from vlaopt.errors import StageError
from vlaopt.hashing import digest_json

_FLOATS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Step:
    """The opened component that a loop repeats: three of its buffers, and what queues one run of it."""

    state: Buffer
    time: Buffer
    velocity: Buffer
    enqueue: Callable[[], None]


class WholeLoop:
    """One euler loop over one step, on one stream. `state`, float32, is where it starts from and what it gives.

    Raises StageError with TensorRT's reason where the engine that updates the state cannot be made.
    """

    def __init__(self, trt: Any, log: Log, stream: Stream, step: Step, euler: Euler, cache: Path | None) -> None:
        self._stream = stream
        self._step = step
        self._log = log
        self._update = _update_context(trt, log, euler.dt, step, _Kept.of(trt, stream, step, euler, cache))
        self.state, self._next = (stream.buffer(step.state.host.shape, "float32") for _ in range(2))
        # What the step takes: the state itself, or rounded to the type of its port.
        kind = step.state.host.dtype.name
        self._taken = self._next if kind == "float32" else stream.buffer(step.state.host.shape, kind)
        self._times = _at_each_time(stream, step.time, euler.times)
        self._bind()

    def start(self, noise: np.ndarray) -> None:
        """Queue the upload of `noise`, float32, as the state before the first step."""
        for buffer in (self.state, self._step.state):
            np.copyto(buffer.host, noise, casting="unsafe")
            self._stream.upload(buffer)

    def queue(self) -> None:
        """Queue all steps. Raises StageError when TensorRT refuses."""
        for time in self._times:
            self._stream.copy(time, self._step.time)
            self._step.enqueue()
            queue(self._update, self._stream, self._log, "update the state of the loop")
            self._stream.copy(self._next, self.state)
            self._stream.copy(self._taken, self._step.state)

    def _bind(self) -> None:
        at = {"state": self.state, "velocity": self._step.velocity, "next": self._next}
        if self._taken is not self._next:
            at["taken"] = self._taken
        for name, buffer in at.items():
            if not self._update.set_tensor_address(name, buffer.device):
                raise StageError(f"TensorRT refuses the address of tensor {name!r}{said(self._log)}")


def queue(context: Any, stream: Stream, log: Log | None, what: str) -> None:
    """Put one run of an engine on the stream; `what` it is to do. Raises StageError when TensorRT refuses."""
    if not context.execute_async_v3(stream.handle):
        raise StageError(f"TensorRT refused to {what}{said(log)}")


def said(log: Log | None) -> str:
    """What a log says of a call that just failed, to follow the sentence that tells of it. It is then told."""
    if log is None or not log.errors:
        return ""
    told = f": {reason(log)}"
    log.errors.clear()
    return told


def _at_each_time(stream: Stream, port: Buffer, times: tuple[float, ...]) -> list[Buffer]:
    """A buffer of the time input for each step, on the device already."""
    all_of_them = stream.buffer((len(times), *port.host.shape), port.host.dtype.name)
    all_of_them.host[:] = np.array(times).reshape(-1, *[1] * port.host.ndim)  # rounded as numpy rounds one number
    stream.upload(all_of_them)
    return [Buffer(part, all_of_them.device + index * part.nbytes) for index, part in enumerate(all_of_them.host)]


@dataclass(frozen=True)
class _Kept:
    """Where the plan of an update lies on this machine once it was built: loading a builder takes time and memory."""

    folder: Path
    key: str

    @classmethod
    def of(cls, trt: Any, stream: Stream, step: Step, euler: Euler, folder: Path | None) -> _Kept | None:
        if folder is None:
            return None
        gpu = stream.library.device()
        form = {"shape": step.state.host.shape, "dt": euler.dt}
        form |= {name: getattr(step, name).host.dtype.name for name in ("state", "velocity")}
        here = {
            "tensorrt": trt.__version__,
            "gpu": gpu.name,
            "sm": gpu.sm,
            "os": platform_name(),
        }
        return cls(folder, digest_json({"euler update": form, **here}))


def _update_context(trt: Any, log: Log, dt: float, step: Step, kept: _Kept | None) -> Any:
    """A context of the engine: next = state + dt · velocity, in float32, and `taken`, rounded, where asked for."""
    runtime = trt.Runtime(log)
    plan = recall(kept.folder, kept.key) if kept else None
    engine = runtime.deserialize_cuda_engine(plan) if plan else None
    if engine is None and (built := _update_plan(trt, log, dt, step)) is not None:
        plan = bytes(built)
        engine = runtime.deserialize_cuda_engine(plan)
        if kept and engine is not None:
            keep(kept.folder, kept.key, plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise StageError(f"TensorRT cannot make the engine that updates the state{said(log)}")
    return context


def _update_plan(trt: Any, log: Log, dt: float, step: Step) -> Any:
    """The plan, or None with the reason in the log."""
    shape = step.state.host.shape
    kinds = [_FLOATS.get(buffer.host.dtype.name) for buffer in (step.state, step.velocity)]
    if None in kinds or step.velocity.host.shape != shape:
        raise StageError("the loop's state and velocity are not of one shape, or no floating-point numbers")
    taken, velocity = (getattr(trt.DataType, str(kind)) for kind in kinds)
    builder = trt.Builder(log)
    number = np.full([1] * len(shape), dt, np.float32)  # TensorRT reads it until the plan is built
    network = update_network(trt, builder, shape, number, taken=taken, velocity=velocity)
    return builder.build_serialized_network(network, builder.create_builder_config())


def update_network(trt: Any, builder: Any, shape: tuple[int, ...], dt: np.ndarray, *, taken: Any, velocity: Any) -> Any:
    """next = state + dt · velocity, in float32, of `shape`; `dt` is one number of as many dimensions.

    `velocity` is the type that the velocity comes in; where `taken`, what the step takes, is another than float32, the
    network also gives the next state rounded to that, as `taken`.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    single = trt.DataType.FLOAT
    state = network.add_input("state", single, trt.Dims(shape))
    given = network.add_input("velocity", velocity, trt.Dims(shape))
    if velocity != single:
        given = network.add_cast(given, single).get_output(0)
    factor = network.add_constant(trt.Dims(dt.shape), trt.Weights(dt)).get_output(0)
    change = network.add_elementwise(given, factor, trt.ElementWiseOperation.PROD).get_output(0)
    after = network.add_elementwise(state, change, trt.ElementWiseOperation.SUM).get_output(0)
    _mark(network, after, "next")
    if taken != single:
        _mark(network, network.add_cast(after, taken).get_output(0), "taken")
    return network


def _mark(network: Any, tensor: Any, name: str) -> None:
    tensor.name = name
    network.mark_output(tensor)
