"""Stand-in for `pycuda.driver` on host memory, after its sources and documentation. Like pycuda it has no CUDA graphs.

Whatever needs a current context and finds none raises LogicError, and a thread that ends with a context on its stack
aborts the process. Files: src/wrapper/wrap_cudadrv.cpp and src/cpp/cuda.hpp of github.com/inducer/pycuda.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from standin import device as core
from standin.device import DEVICE, CudaError
from standin.settings import settings

if settings().has("no-driver"):
    raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")


class Error(Exception):
    """Base of pycuda's errors."""


class MemoryError(Error):
    """CUDA is out of memory."""


class LogicError(Error):
    """The call is wrong, or CUDA is in a state that forbids it."""


class LaunchError(Error):
    """A kernel could not be started, or failed."""


class RuntimeError(Error):
    """No device, or a device that is not ready."""


class device_attribute(IntEnum):
    INTEGRATED = 18
    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76


class ctx_flags(IntEnum):
    SCHED_AUTO = 0
    SCHED_SPIN = 1
    SCHED_YIELD = 2
    SCHED_BLOCKING_SYNC = 4


class host_alloc_flags:
    PORTABLE = 1
    DEVICEMAP = 2
    WRITECOMBINED = 4


class event_flags(IntEnum):
    DEFAULT = 0
    BLOCKING_SYNC = 1
    DISABLE_TIMING = 2


_TEXTS = {
    1: "invalid argument", 2: "out of memory", 3: "initialization error", 100: "no CUDA-capable device is detected",
    101: "invalid device ordinal", 201: "invalid device context", 400: "invalid resource handle",
    600: "device not ready", 700: "an illegal memory access was encountered", 719: "unspecified launch failure",
    900: "operation not permitted when stream is capturing",
}  # fmt: skip
_KINDS: dict[int, type[Error]] = {2: MemoryError, 100: RuntimeError, 600: RuntimeError, 719: LaunchError, 999: Error}


def _fail(routine: str, code: int, more: str = "") -> Error:
    text = f"{routine} failed: {_TEXTS.get(code, 'unknown error')}" + (f" - {more}" if more else "")
    return _KINDS.get(code, LogicError)(text)


class _Stack(list["Context"]):
    def __del__(self) -> None:
        if self and sys.modules.get(__name__) is not None and sys.modules[__name__].__dict__.get("_stack") is _stack:
            sys.stderr.write("PyCUDA ERROR: The context stack was not empty upon module cleanup.\n")
            sys.stderr.flush()
            os.abort()


class _Threads(threading.local):
    def __init__(self) -> None:
        self.contexts = _Stack()


_stack = _Threads()
_state = {"initialised": False}


def _call(routine: str, *, context: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the driver; CUDA's errors become pycuda's with the name of the driver's `routine`."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            settings().note(f"pycuda.{function.__qualname__}", *arguments, *named.values())
            if not _state["initialised"]:
                raise _fail(routine, 3)
            if context and not _stack.contexts:
                raise _fail(routine, 201)
            try:
                DEVICE.raise_sticky()
                return function(*arguments, **named)
            except CudaError as error:
                raise _fail(routine, error.code) from None

        return called

    return wrap


def init(flags: int = 0) -> None:
    """Must come before everything else."""
    settings().note("pycuda.init")
    if settings().has("no-gpu"):
        raise _fail("cuInit", 100)
    _state["initialised"] = True


def get_version() -> tuple[int, int, int]:
    return 12, 6, 0


def get_driver_version() -> int:
    return settings().driver


class Device:
    """The one GPU."""

    def __init__(self, number: int = 0) -> None:
        if not _state["initialised"]:
            raise _fail("cuDeviceGet", 3)
        if number != 0:
            raise _fail("cuDeviceGet", 101)

    @staticmethod
    @_call("cuDeviceGetCount", context=False)
    def count() -> int:
        return 1

    def name(self) -> str:
        return settings().gpu

    def pci_bus_id(self) -> str:
        return "0000:00:00.0"

    def compute_capability(self) -> tuple[int, int]:
        major, minor = settings().sm.split(".")
        return int(major), int(minor)

    def total_memory(self) -> int:
        return DEVICE.total_bytes

    def get_attribute(self, attribute: device_attribute) -> int:
        major, minor = self.compute_capability()
        return {18: int(settings().integrated), 75: major, 76: minor}[int(device_attribute(attribute))]

    @_call("cuCtxCreate", context=False)
    def make_context(self, flags: int = 0) -> Context:
        made = Context._made()
        made.push()
        return made

    @_call("cuDevicePrimaryCtxRetain", context=False)
    def retain_primary_context(self) -> Context:
        return Context._made()


class Context:
    """One per device, as far as the stand-in goes; `pop` takes the current one off this thread's stack."""

    def __init__(self) -> None:
        raise builtins.RuntimeError("This class cannot be instantiated from Python")

    @classmethod
    def _made(cls) -> Context:
        return cls.__new__(cls)

    def push(self) -> None:
        settings().note("pycuda.Context.push")
        _stack.contexts.append(self)

    @staticmethod
    def pop() -> None:
        settings().note("pycuda.Context.pop")
        if not _stack.contexts:
            raise _fail("context::pop", 201, "cannot pop non-current context")
        _stack.contexts.pop()

    def detach(self) -> None:
        if self in _stack.contexts:
            _stack.contexts.remove(self)

    @staticmethod
    def get_current() -> Context | None:
        return _stack.contexts[-1] if _stack.contexts else None

    @staticmethod
    @_call("cuCtxGetDevice")
    def get_device() -> Device:
        return Device(0)

    @staticmethod
    @_call("cuCtxSynchronize")
    def synchronize() -> None:
        DEVICE.wait_all()


class DeviceAllocation:
    """Memory on the device, freed with the object; its number is its address."""

    def __init__(self, address: int) -> None:
        self._address: int | None = address

    def __int__(self) -> int:
        if self._address is None:
            raise _fail("device_allocation::operator CUdeviceptr", 400)
        return self._address

    __index__ = __int__

    def free(self) -> None:
        if self._address is None:
            raise _fail("device_allocation::free", 400)
        _free(self._address, "device")
        self._address = None

    def __del__(self) -> None:
        if self._address is not None:
            DEVICE.free(self._address, "device")


class PagelockedHostAllocation:
    """Pinned memory: the base of what `pagelocked_empty` gives."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._address: int | None = address
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (address, False), "version": 3}

    def free(self) -> None:
        if self._address is None:
            raise _fail("pagelocked_host_allocation::free", 400)
        _free(self._address, "pinned")
        self._address = None

    def __del__(self) -> None:
        if self._address is not None:
            DEVICE.free(self._address, "pinned")


@_call("cuMemFree")
def _free(address: int, where: str) -> None:
    DEVICE.free(address, where)


@_call("cuMemGetInfo")
def mem_get_info() -> tuple[int, int]:
    return DEVICE.free_bytes, DEVICE.total_bytes


@_call("cuMemAlloc")
def mem_alloc(bytes: int) -> DeviceAllocation:
    return DeviceAllocation(DEVICE.allocate(_number(bytes), "device"))


@_call("cuMemHostAlloc")
def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (int(shape),)
    kind = np.dtype(dtype)
    address = DEVICE.allocate(int(np.prod(sizes, dtype=np.int64)) * kind.itemsize, "pinned")
    return np.asarray(PagelockedHostAllocation(address, sizes, kind))


class Stream:
    """Destroyed with its object."""

    @_call("cuStreamCreate")
    def __init__(self, flags: int = 0) -> None:
        self._handle = DEVICE.make_stream(blocking=flags == 0)

    @property
    def handle(self) -> int:
        return self._handle

    @_call("cuStreamSynchronize")
    def synchronize(self) -> Stream:
        DEVICE.wait(self._handle)
        return self

    @_call("cuStreamQuery")
    def is_done(self) -> bool:
        return not DEVICE.stream(self._handle).queue

    @_call("cuStreamWaitEvent")
    def wait_for_event(self, evt: Event) -> None:
        DEVICE.enqueue(self._handle, lambda: evt._event.done or DEVICE.drain(evt._event.stream))

    def __del__(self) -> None:
        if "_handle" in self.__dict__:
            DEVICE.destroy_stream(self._handle)


class Event:
    """A point in a stream."""

    @_call("cuEventCreate")
    def __init__(self, flags: int = 0) -> None:
        handle = DEVICE.new_handle()
        self._event = DEVICE.events[handle] = core.Event(handle)

    @_call("cuEventRecord")
    def record(self, stream: Stream | None = None) -> Event:
        event = self._event
        event.stream, event.recorded, event.done = DEVICE.stream(_handle(stream)), True, False

        def reached() -> None:
            event.done, event.at_ns = True, time.perf_counter_ns()

        DEVICE.enqueue(_handle(stream), reached)
        return self

    @_call("cuEventSynchronize")
    def synchronize(self) -> Event:
        if not self._event.done and self._event.stream is not None:
            DEVICE.wait(self._event.stream.handle)
        return self

    @_call("cuEventQuery")
    def query(self) -> bool:
        return self._event.done

    @_call("cuEventElapsedTime")
    def time_since(self, event: Event) -> float:
        if not (self._event.recorded and event._event.recorded):
            raise CudaError(core.INVALID_HANDLE)
        if not (self._event.done and event._event.done):
            raise CudaError(core.NOT_READY)
        return (self._event.at_ns - event._event.at_ns) / 1e6

    def time_till(self, event: Event) -> float:
        return event.time_since(self)

    def __del__(self) -> None:
        if "_event" in self.__dict__:
            DEVICE.events.pop(self._event.handle, None)


def _handle(stream: Stream | None) -> int:
    if stream is not None and not isinstance(stream, Stream):
        raise TypeError("stream must be a Stream or None")
    return 0 if stream is None else stream.handle


def _number(value: Any) -> int:
    if isinstance(value, float | str | bytes) or not hasattr(value, "__index__"):
        raise TypeError("Python argument types did not match C++ signature")
    return int(value)


def _host(value: Any, *, writable: bool) -> tuple[int, int]:
    """Address and size of a contiguous buffer."""
    view = memoryview(value)
    if not view.contiguous:
        raise ValueError("ndarray is not contiguous")
    if writable and view.readonly:
        raise BufferError("Object is not writable.")
    array = np.frombuffer(view.cast("B") if view.ndim != 1 or view.format != "B" else view, np.uint8)
    return array.ctypes.data, view.nbytes


def _move(to: int, source: int, size: int, stream: int | None) -> None:
    DEVICE.enqueue(stream or 0, lambda: ctypes.memmove(to, source, size))  # type: ignore[arg-type,return-value]


@_call("cuMemcpyHtoD")
def memcpy_htod(dest: Any, src: Any) -> None:
    source, size = _host(src, writable=False)
    DEVICE.check_range(_number(dest), size, "device")
    _move(_number(dest), source, size, None)


@_call("cuMemcpyHtoDAsync")
def memcpy_htod_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
    source, size = _host(src, writable=False)
    DEVICE.check_range(_number(dest), size, "device")
    _move(_number(dest), source, size, _handle(stream))


@_call("cuMemcpyDtoH")
def memcpy_dtoh(dest: Any, src: Any) -> None:
    to, size = _host(dest, writable=True)
    DEVICE.check_range(_number(src), size, "device")
    _move(to, _number(src), size, None)


@_call("cuMemcpyDtoHAsync")
def memcpy_dtoh_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
    to, size = _host(dest, writable=True)
    DEVICE.check_range(_number(src), size, "device")
    _move(to, _number(src), size, _handle(stream))


@_call("cuMemcpyDtoD")
def memcpy_dtod(dest: Any, src: Any, size: int) -> None:
    for address in (dest, src):
        DEVICE.check_range(_number(address), size, "device")
    _move(_number(dest), _number(src), size, None)


@_call("cuMemcpyDtoDAsync")
def memcpy_dtod_async(dest: Any, src: Any, size: int, stream: Stream | None = None) -> None:
    for address in (dest, src):
        DEVICE.check_range(_number(address), size, "device")
    _move(_number(dest), _number(src), size, _handle(stream))


@_call("cuMemsetD8")
def memset_d8(dest: Any, data: int, size: int) -> None:
    DEVICE.check_range(_number(dest), size, "device")
    DEVICE.enqueue(0, lambda: ctypes.memset(_number(dest), data, size))  # type: ignore[arg-type,return-value]
