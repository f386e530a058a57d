"""Stand-in for `cuda.bindings.runtime` on host memory: names, arguments and answers as in NVIDIA's cuda-python.

Every function answers a tuple, the error code first. A test holds every name against the installed module.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from standin import device as core
from standin.device import DEVICE, CudaError, Event
from standin.settings import settings


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInitializationError = 3
    cudaErrorInvalidMemcpyDirection = 21
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorNotSupported = 801
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureUnmatched = 903
    cudaErrorStreamCaptureImplicit = 906
    cudaErrorStreamCaptureWrongThread = 908
    cudaErrorUnknown = 999


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaStreamCaptureStatus(IntEnum):
    cudaStreamCaptureStatusNone = 0
    cudaStreamCaptureStatusActive = 1
    cudaStreamCaptureStatusInvalidated = 2


class cudaDeviceAttr(IntEnum):
    cudaDevAttrIntegrated = 18
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


cudaStreamDefault = 0
cudaStreamNonBlocking = 1
cudaHostAllocDefault = 0
cudaHostAllocPortable = 1
cudaHostAllocMapped = 2
cudaEventDefault = 0
cudaEventDisableTiming = 2

_TEXTS = {
    0: b"no error",
    1: b"invalid argument",
    2: b"out of memory",
    3: b"initialization error",
    21: b"invalid copy direction for memcpy",
    35: b"CUDA driver version is insufficient for CUDA runtime version",
    100: b"no CUDA-capable device is detected",
    101: b"invalid device ordinal",
    400: b"invalid resource handle",
    600: b"device not ready",
    700: b"an illegal memory access was encountered",
    719: b"unspecified launch failure",
    801: b"operation not supported",
    900: b"operation not permitted when stream is capturing",
    901: b"operation failed due to a previous error during capture",
    903: b"capture was not ended in the same stream as it began",
    906: b"operation would make the legacy stream depend on a capturing blocking stream",
    908: b"attempt to terminate a thread-local capture sequence from another thread",
    999: b"unknown error",
}


class _Handle:
    def __init__(self, init_value: int = 0, _ptr: int = 0) -> None:
        self._value = init_value or _ptr

    def __int__(self) -> int:
        return self._value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} 0x{self._value:x}>"

    def getPtr(self) -> int:
        raise NotImplementedError("stand-in: getPtr is not written")


class cudaStream_t(_Handle):
    pass


class cudaEvent_t(_Handle):
    pass


class cudaGraph_t(_Handle):
    pass


class cudaGraphExec_t(_Handle):
    pass


class cudaDeviceProp:
    """The properties that the stand-in knows; another raises AttributeError."""

    def __init__(self) -> None:
        now = settings()
        major, minor = now.sm.split(".")
        self.name = now.gpu.encode()
        self.major, self.minor = int(major), int(minor)
        self.totalGlobalMem = now.memory_mib << 20
        self.integrated = int(now.integrated)
        self.multiProcessorCount = 16
        self.warpSize = 32


def _call(answers: int = 0) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """A function of the runtime: it gives `answers` values behind its error code, None each where it fails."""

    def wrap(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        @functools.wraps(function)
        def called(*arguments: Any) -> tuple[Any, ...]:
            now = settings()
            now.note(f"cuda.{function.__name__}", *(int(a) if isinstance(a, _Handle) else a for a in arguments))
            try:
                if function.__name__ not in _WITHOUT_DEVICE:
                    if now.has("no-driver"):
                        raise CudaError(core.INSUFFICIENT_DRIVER)
                    if now.has("no-gpu"):
                        raise CudaError(core.NO_DEVICE)
                    DEVICE.raise_sticky()
                given = function(*arguments)
            except CudaError as error:
                return (cudaError_t(error.code), *(None,) * answers)
            if answers == 0:
                return (cudaError_t.cudaSuccess,)
            return (cudaError_t.cudaSuccess, *(given if answers > 1 else (given,)))

        return called

    return wrap


_WITHOUT_DEVICE = {"cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetErrorString", "cudaGetErrorName"}


def _integer(value: Any) -> int:
    if isinstance(value, float | str | bytes) or not hasattr(value, "__int__"):
        raise TypeError(f"an integer or a handle is required, not {type(value).__name__}")
    return int(value)


def _kind(value: Any) -> int:
    if not isinstance(value, cudaMemcpyKind):
        raise TypeError("Argument 'kind' must be cudaMemcpyKind")
    return int(value)


@_call(1)
def cudaDriverGetVersion() -> int:
    return 0 if settings().has("no-driver") else settings().driver


@_call(1)
def cudaRuntimeGetVersion() -> int:
    return 13040


@_call(1)
def cudaGetErrorString(error: cudaError_t) -> bytes:
    return _TEXTS.get(int(error), b"unrecognized error code")


@_call(1)
def cudaGetErrorName(error: cudaError_t) -> bytes:
    return cudaError_t(error).name.encode()


@_call()
def cudaGetLastError() -> None:
    """No error is kept beside the sticky ones."""


@_call()
def cudaPeekAtLastError() -> None:
    """No error is kept beside the sticky ones."""


@_call(1)
def cudaGetDeviceCount() -> int:
    return 1


@_call(1)
def cudaGetDevice() -> int:
    return 0


@_call()
def cudaSetDevice(device: int) -> None:
    if device != 0:
        raise CudaError(core.INVALID_DEVICE)


@_call(1)
def cudaGetDeviceProperties(device: int) -> cudaDeviceProp:
    if device != 0:
        raise CudaError(core.INVALID_DEVICE)
    return cudaDeviceProp()


@_call(1)
def cudaDeviceGetAttribute(attr: cudaDeviceAttr, device: int) -> int:
    if device != 0:
        raise CudaError(core.INVALID_DEVICE)
    properties = cudaDeviceProp()
    return {18: properties.integrated, 75: properties.major, 76: properties.minor}[int(cudaDeviceAttr(attr))]


@_call(2)
def cudaMemGetInfo() -> tuple[int, int]:
    return DEVICE.free_bytes, DEVICE.total_bytes


@_call(1)
def cudaMalloc(size: int) -> int:
    return DEVICE.allocate(_integer(size), "device")


@_call()
def cudaFree(devPtr: Any) -> None:
    DEVICE.free(_integer(devPtr), "device")


@_call(1)
def cudaMallocHost(size: int) -> int:
    return DEVICE.allocate(_integer(size), "pinned")


@_call(1)
def cudaHostAlloc(size: int, flags: int) -> int:
    return DEVICE.allocate(_integer(size), "pinned")


@_call()
def cudaFreeHost(ptr: Any) -> None:
    DEVICE.free(_integer(ptr), "pinned")


def _copy(dst: Any, src: Any, count: int, kind: cudaMemcpyKind) -> Callable[[], None]:
    to, source, size = _integer(dst), _integer(src), _integer(count)
    on_device = {1: (True, False), 2: (False, True), 3: (True, True), 0: (False, False)}
    if (number := _kind(kind)) == cudaMemcpyKind.cudaMemcpyDefault:
        sides = (DEVICE.is_device(to), DEVICE.is_device(source))
    else:
        sides = on_device[number]
    for address, device in zip((to, source), sides, strict=True):
        if device:
            DEVICE.check_range(address, size, "device")
        elif DEVICE.is_device(address):
            raise CudaError(core.INVALID_VALUE)
    return lambda: ctypes.memmove(to, source, size)  # type: ignore[return-value]


@_call()
def cudaMemcpy(dst: Any, src: Any, count: int, kind: cudaMemcpyKind) -> None:
    work = _copy(dst, src, count, kind)
    DEVICE.enqueue(0, work)
    DEVICE.raise_sticky()


@_call()
def cudaMemcpyAsync(dst: Any, src: Any, count: int, kind: cudaMemcpyKind, stream: Any) -> None:
    DEVICE.enqueue(_integer(stream), _copy(dst, src, count, kind))


@_call()
def cudaMemset(devPtr: Any, value: int, count: int) -> None:
    DEVICE.check_range(_integer(devPtr), count, "device")
    DEVICE.enqueue(0, lambda: ctypes.memset(_integer(devPtr), value, count))  # type: ignore[arg-type,return-value]


@_call()
def cudaMemsetAsync(devPtr: Any, value: int, count: int, stream: Any) -> None:
    DEVICE.check_range(_integer(devPtr), count, "device")
    DEVICE.enqueue(_integer(stream), lambda: ctypes.memset(_integer(devPtr), value, count))  # type: ignore[arg-type,return-value]


@_call(1)
def cudaStreamCreate() -> cudaStream_t:
    return cudaStream_t(DEVICE.make_stream())


@_call(1)
def cudaStreamCreateWithFlags(flags: int) -> cudaStream_t:
    if flags not in (cudaStreamDefault, cudaStreamNonBlocking):
        raise CudaError(core.INVALID_VALUE)
    return cudaStream_t(DEVICE.make_stream(blocking=flags == cudaStreamDefault))


@_call()
def cudaStreamDestroy(stream: Any) -> None:
    DEVICE.destroy_stream(_integer(stream))


@_call()
def cudaStreamSynchronize(stream: Any) -> None:
    DEVICE.wait(_integer(stream))


@_call()
def cudaStreamQuery(stream: Any) -> None:
    if DEVICE.stream(_integer(stream)).queue:
        raise CudaError(core.NOT_READY)


@_call()
def cudaDeviceSynchronize() -> None:
    DEVICE.wait_all()


@_call()
def cudaStreamBeginCapture(stream: Any, mode: cudaStreamCaptureMode) -> None:
    if not isinstance(mode, cudaStreamCaptureMode):
        raise TypeError("Argument 'mode' must be cudaStreamCaptureMode")
    DEVICE.begin_capture(_integer(stream), int(mode))


@_call(1)
def cudaStreamEndCapture(stream: Any) -> cudaGraph_t:
    return cudaGraph_t(DEVICE.end_capture(_integer(stream)))


@_call(1)
def cudaStreamIsCapturing(stream: Any) -> cudaStreamCaptureStatus:
    found = DEVICE.stream(_integer(stream))
    return cudaStreamCaptureStatus((2 if found.broken else 1) if found.capturing else 0)


@_call(1)
def cudaGraphInstantiate(graph: Any, flags: int) -> cudaGraphExec_t:
    return cudaGraphExec_t(DEVICE.instantiate(_integer(graph)))


@_call()
def cudaGraphUpload(graphExec: Any, stream: Any) -> None:
    if _integer(graphExec) not in DEVICE.executables:
        raise CudaError(core.INVALID_VALUE)


@_call()
def cudaGraphLaunch(graphExec: Any, stream: Any) -> None:
    DEVICE.launch(_integer(graphExec), _integer(stream))


@_call()
def cudaGraphDestroy(graph: Any) -> None:
    if DEVICE.graphs.pop(_integer(graph), None) is None:
        raise CudaError(core.INVALID_VALUE)


@_call()
def cudaGraphExecDestroy(graphExec: Any) -> None:
    if DEVICE.executables.pop(_integer(graphExec), None) is None:
        raise CudaError(core.INVALID_VALUE)


def _event(event: Any) -> Event:
    if _integer(event) not in DEVICE.events:
        raise CudaError(core.INVALID_HANDLE)
    return DEVICE.events[_integer(event)]


@_call(1)
def cudaEventCreate() -> cudaEvent_t:
    handle = DEVICE.new_handle()
    DEVICE.events[handle] = Event(handle)
    return cudaEvent_t(handle)


@_call(1)
def cudaEventCreateWithFlags(flags: int) -> cudaEvent_t:
    handle = DEVICE.new_handle()
    DEVICE.events[handle] = Event(handle)
    return cudaEvent_t(handle)


@_call()
def cudaEventRecord(event: Any, stream: Any) -> None:
    found, on = _event(event), DEVICE.stream(_integer(stream))
    found.stream, found.recorded, found.done = on, True, False

    def reached() -> None:
        found.done, found.at_ns = True, time.perf_counter_ns()

    DEVICE.enqueue(on.handle, reached)


@_call()
def cudaEventSynchronize(event: Any) -> None:
    found = _event(event)
    if not found.done and found.stream is not None:
        DEVICE.wait(found.stream.handle)


@_call()
def cudaEventQuery(event: Any) -> None:
    if not _event(event).done:
        raise CudaError(core.NOT_READY)


@_call(1)
def cudaEventElapsedTime(start: Any, end: Any) -> float:
    first, last = _event(start), _event(end)
    if not (first.recorded and last.recorded):
        raise CudaError(core.INVALID_HANDLE)
    if not (first.done and last.done):
        raise CudaError(core.NOT_READY)
    return (last.at_ns - first.at_ns) / 1e6


@_call()
def cudaEventDestroy(event: Any) -> None:
    del DEVICE.events[_event(event).handle]


@_call()
def cudaStreamWaitEvent(stream: Any, event: Any, flags: int) -> None:
    found = _event(event)

    def wait() -> None:
        if not found.done and found.stream is not None:
            DEVICE.drain(found.stream)

    DEVICE.enqueue(_integer(stream), wait)
