"""The two libraries that reach CUDA from Python, cuda-python and pycuda, behind the same few methods."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlaopt.errors import EnvironmentProblem

Free = Callable[[], Any]

_NEW_PROCESS = "this error stays until the process ends; start it again"
_OUT_OF_MEMORY, _INSUFFICIENT_DRIVER = 2, 35
# CUDA's list of errors after which "the process must be terminated and relaunched" (enum cudaError_t).
_STICKY = {226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 911}


@dataclass(frozen=True)
class Device:
    """A GPU. `sm` is its compute capability like "8.7"; an `integrated` one shares `memory_mib` with the CPU.

    `driver` is the newest CUDA that the driver serves, like "12.6"; None where the library does not tell.
    """

    name: str
    sm: str
    memory_mib: int
    integrated: bool
    driver: str | None


class Library(Protocol):
    """Memory, streams, graphs and events of the first GPU. What is made comes with the function that frees it.

    Every method raises EnvironmentProblem with CUDA's own reason. Addresses and sizes are in bytes.
    """

    name: str
    graphs: bool
    """Whether `begin`, `end` and `launch` can be called."""

    def devices(self) -> int: ...
    def device(self) -> Device: ...
    def free_memory(self) -> int: ...
    def stream(self) -> tuple[int, Free]: ...
    def memory(self, size: int) -> tuple[int, Free]: ...
    def pinned(self, size: int) -> tuple[np.ndarray, Free]: ...
    def upload(self, to: int, source: np.ndarray, stream: int) -> None: ...
    def download(self, to: np.ndarray, source: int, stream: int) -> None: ...
    def copy(self, to: int, source: int, size: int, stream: int) -> None: ...
    def wait(self, stream: int) -> None: ...
    def begin(self, stream: int) -> None: ...
    def end(self, stream: int) -> tuple[Any, Free]: ...
    def launch(self, graph: Any, stream: int) -> None: ...
    def event(self) -> tuple[Any, Free]: ...
    def record(self, event: Any, stream: int) -> None: ...
    def elapsed_ms(self, first: Any, last: Any) -> float: ...


def cuda_library() -> Library:
    """cuda-python, or pycuda where only that can be imported. Raises EnvironmentProblem with the reason of each."""
    reasons = []
    for make in (_cuda_python, _pycuda):
        try:
            return make()
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:  # a library that it links to is not there
            reasons.append(" ".join(str(error).split()))
    reason = "; ".join(reasons) or "neither cuda-python nor pycuda is installed"
    raise EnvironmentProblem(f"CUDA cannot be used from Python: {reason}", hint="pip install cuda-python")


class CudaPython:
    """NVIDIA's cuda-python; `runtime` is its module `cuda.bindings.runtime`, or one with its functions."""

    name = "cuda-python"
    graphs = True

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def devices(self) -> int:
        try:
            return int(self._call("cudaGetDeviceCount"))
        except EnvironmentProblem:
            if not self._call("cudaDriverGetVersion"):
                raise EnvironmentProblem("no NVIDIA driver is installed") from None
            raise

    def device(self) -> Device:
        found = self._call("cudaGetDeviceProperties", 0)
        version = int(self._call("cudaDriverGetVersion"))
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        sm, memory_mib = f"{found.major}.{found.minor}", int(found.totalGlobalMem) >> 20
        return Device(name.rstrip("\0"), sm, memory_mib, bool(found.integrated), _cuda_version(version))

    def free_memory(self) -> int:
        free, _ = _values(self._runtime, self._runtime.cudaMemGetInfo())
        return int(free)

    def stream(self) -> tuple[int, Free]:
        # One that does not wait for the default stream: work there, such as torch's, would spoil a capture.
        stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        return int(stream), lambda: self._runtime.cudaStreamDestroy(stream)

    def memory(self, size: int) -> tuple[int, Free]:
        address = int(self._call("cudaMalloc", size))
        return address, lambda: self._runtime.cudaFree(address)

    def pinned(self, size: int) -> tuple[np.ndarray, Free]:
        address = int(self._call("cudaMallocHost", size))
        memory = (ctypes.c_byte * size).from_address(address)
        return np.frombuffer(memoryview(memory), np.uint8), lambda: self._runtime.cudaFreeHost(address)

    def upload(self, to: int, source: np.ndarray, stream: int) -> None:
        self._copy(to, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, to: np.ndarray, source: int, stream: int) -> None:
        self._copy(to.ctypes.data, source, to.nbytes, "cudaMemcpyDeviceToHost", stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy(to, source, size, "cudaMemcpyDeviceToDevice", stream)

    def wait(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def begin(self, stream: int) -> None:
        # Only this thread's calls can spoil the capture: another may be opening a policy meanwhile.
        self._call(
            "cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )

    def end(self, stream: int) -> tuple[Any, Free]:
        try:
            graph = self._call("cudaStreamEndCapture", stream)
            try:
                launched = self._call("cudaGraphInstantiate", graph, 0)
            finally:
                self._runtime.cudaGraphDestroy(graph)
        except EnvironmentProblem:
            self._runtime.cudaGetLastError()  # else the next launch of a kernel would be told of this error
            raise
        return launched, lambda: self._runtime.cudaGraphExecDestroy(launched)

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def event(self) -> tuple[Any, Free]:
        event = self._call("cudaEventCreate")
        return event, lambda: self._runtime.cudaEventDestroy(event)

    def record(self, event: Any, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        return float(self._call("cudaEventElapsedTime", first, last))

    def _copy(self, to: int, source: int, size: int, kind: str, stream: int) -> None:
        self._call("cudaMemcpyAsync", to, source, size, getattr(self._runtime.cudaMemcpyKind, kind), stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        values = _values(self._runtime, getattr(self._runtime, name)(*arguments))
        return values[0] if values else None


class PyCuda:
    """pycuda; `driver` is its module `pycuda.driver`. It has no graphs.

    Its context is made current around each call and never left so: pycuda aborts a process whose thread ends with one.
    It is the GPU's primary context, the one that TensorRT's own CUDA runtime uses.
    """

    name = "pycuda"
    graphs = False

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}

    def devices(self) -> int:
        with self._errors():
            self._driver.init()
            return int(self._driver.Device.count())

    def device(self) -> Device:
        with self._errors():
            self._driver.init()
            found = self._driver.Device(0)
            integrated = found.get_attribute(self._driver.device_attribute.INTEGRATED)
            version, sm = self._driver.get_driver_version(), "{}.{}".format(*found.compute_capability())
            return Device(found.name(), sm, found.total_memory() >> 20, bool(integrated), _cuda_version(version))

    def free_memory(self) -> int:
        with self._current():
            return int(self._driver.mem_get_info()[0])

    def stream(self) -> tuple[int, Free]:
        with self._current():
            stream = self._driver.Stream()
        handle = int(stream.handle)
        self._streams[handle] = stream
        return handle, lambda: self._drop(self._streams, handle)

    def memory(self, size: int) -> tuple[int, Free]:
        with self._current():
            allocation = self._driver.mem_alloc(size)
        return int(allocation), lambda: self._free(allocation)

    def pinned(self, size: int) -> tuple[np.ndarray, Free]:
        with self._current():
            array = self._driver.pagelocked_empty(size, np.uint8)
        return array, lambda: self._free(array.base)

    def upload(self, to: int, source: np.ndarray, stream: int) -> None:
        with self._current():
            self._driver.memcpy_htod_async(to, _bytes(source), self._streams[stream])

    def download(self, to: np.ndarray, source: int, stream: int) -> None:
        with self._current():
            self._driver.memcpy_dtoh_async(_bytes(to), source, self._streams[stream])

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        with self._current():
            self._driver.memcpy_dtod_async(to, source, size, self._streams[stream])

    def wait(self, stream: int) -> None:
        with self._current():
            self._streams[stream].synchronize()

    def begin(self, stream: int) -> None:
        raise EnvironmentProblem("pycuda has no CUDA graphs", hint="pip install cuda-python")

    def end(self, stream: int) -> tuple[Any, Free]:
        raise EnvironmentProblem("pycuda has no CUDA graphs", hint="pip install cuda-python")

    def launch(self, graph: Any, stream: int) -> None:
        raise EnvironmentProblem("pycuda has no CUDA graphs", hint="pip install cuda-python")

    def event(self) -> tuple[int, Free]:
        with self._current():
            event = self._driver.Event()
        self._events[id(event)] = event
        return id(event), functools.partial(self._drop, self._events, id(event))

    def record(self, event: int, stream: int) -> None:
        with self._current():
            self._events[event].record(self._streams[stream])

    def elapsed_ms(self, first: int, last: int) -> float:
        with self._current():
            return float(self._events[last].time_since(self._events[first]))

    def _drop(self, made: dict[int, Any], handle: int) -> None:
        with self._current():
            del made[handle]  # pycuda destroys a stream or an event with its object

    def _free(self, allocation: Any) -> None:
        with self._current():
            allocation.free()

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self._errors():
            _primary_context(self._driver).push()
            try:
                yield
            finally:
                self._driver.Context.pop()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            memory = isinstance(error, self._driver.MemoryError)
            hint = _HINTS[_OUT_OF_MEMORY] if memory else _NEW_PROCESS if _is_launch(self._driver, error) else None
            raise EnvironmentProblem(f"CUDA error: {' '.join(str(error).split())}", hint=hint) from error


_HINTS = {
    _OUT_OF_MEMORY: "free memory of the GPU: close other programs, or sessions that are not needed",
    _INSUFFICIENT_DRIVER: "the driver is older than this CUDA: update it, or install an older cuda-python",
    **dict.fromkeys(_STICKY, _NEW_PROCESS),
}


def _cuda_python() -> Library:
    try:
        return CudaPython(importlib.import_module("cuda.bindings.runtime"))
    except ModuleNotFoundError:
        return CudaPython(importlib.import_module("cuda.cudart"))  # its name before 12.6


def _pycuda() -> Library:
    return PyCuda(importlib.import_module("pycuda.driver"))


@functools.cache
def _primary_context(driver: Any) -> Any:
    """The first GPU's, retained once in a process: pycuda leaves one that it releases current on the thread."""
    driver.init()
    return driver.Device(0).retain_primary_context()


def _values(runtime: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values behind the error code of a cuda-python `answer`. Raises EnvironmentProblem with CUDA's reason."""
    code, *values = answer
    if code != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(code)
        reason = text.decode() if isinstance(text, bytes) else text
        raise EnvironmentProblem(f"CUDA error {int(code)}: {reason}", hint=_HINTS.get(int(code)))
    return tuple(values)


def _is_launch(driver: Any, error: Exception) -> bool:
    """Whether pycuda tells of a kernel that failed: what CUDA calls sticky, it calls LaunchError or names illegal."""
    return isinstance(error, driver.LaunchError) or "illegal" in str(error)


def _bytes(array: np.ndarray) -> np.ndarray:
    """The memory of a contiguous array; types that numpy borrows, such as bfloat16, offer no buffer themselves."""
    return array.reshape(-1).view(np.uint8)


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
