"""The NVIDIA driver and the memory of one session: buffers in pairs (pinned host, device) on one stream."""

from __future__ import annotations

import ctypes
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaopt.errors import EnvironmentProblem

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def driver_problem() -> str | None:
    """None when an NVIDIA driver with a visible GPU answers, else the reason in one line."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"no NVIDIA driver: {_DRIVER} cannot be loaded"
    if code := driver.cuInit(0):
        return f"no usable NVIDIA driver: cuInit answers error {code}"
    count = ctypes.c_int()
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"no usable NVIDIA driver: cuDeviceGetCount answers error {code}"
    return None if count.value else "the NVIDIA driver sees no GPU"


@dataclass(frozen=True)
class Buffer:
    """One tensor in both memories: `host` is a numpy view of pinned memory, `device` an address."""

    host: np.ndarray
    device: int


class Stream:
    """A CUDA stream and the buffers made on it; all are freed with it.

    `runtime` is the module `cuda.bindings.runtime` of NVIDIA's cuda-python, or one with its functions.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._stream = self._call("cudaStreamCreate")
        self._freed_by: list[tuple[str, Any]] = [("cudaStreamDestroy", self._stream)]
        self._finalizer = weakref.finalize(self, _free, runtime, self._freed_by)

    @property
    def handle(self) -> int:
        return int(self._stream)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of static `shape`. Raises EnvironmentProblem when memory runs out."""
        size = max(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
        device = int(self._call("cudaMalloc", size))
        self._freed_by.append(("cudaFree", device))
        pinned = int(self._call("cudaMallocHost", size))
        self._freed_by.append(("cudaFreeHost", pinned))
        memory = (ctypes.c_byte * size).from_address(pinned)
        count = int(np.prod(shape, dtype=np.int64))
        return Buffer(np.frombuffer(memoryview(memory), dtype=dtype, count=count).reshape(shape), device)

    def upload(self, buffer: Buffer) -> None:
        """Queue the copy of `buffer` to the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(buffer.device, buffer.host.ctypes.data, buffer.host.nbytes, kind)

    def download(self, buffer: Buffer) -> None:
        """Queue the copy of `buffer` to the host; complete after `wait`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(buffer.host.ctypes.data, buffer.device, buffer.host.nbytes, kind)

    def copy(self, source: Buffer, to: Buffer) -> None:
        """Queue the copy of `source` into `to`, of the same size, on the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(to.device, source.device, to.host.nbytes, kind)

    def wait(self) -> None:
        """Until all that was queued is done."""
        _check(self._runtime, self._runtime.cudaStreamSynchronize(self._stream))

    def close(self) -> None:
        """Free the buffers and the stream, in the opposite order of their making."""
        self._finalizer()

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        _check(self._runtime, self._runtime.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def _call(self, name: str, *arguments: int) -> Any:
        return _check(self._runtime, getattr(self._runtime, name)(*arguments))[0]


def _check(runtime: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values behind the error code of a cuda-python `answer`. Raises EnvironmentProblem with CUDA's reason."""
    code, *values = answer
    if code != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(code)
        raise EnvironmentProblem(
            f"CUDA error {int(code)}: {text.decode() if isinstance(text, bytes) else text}",
            hint="a CUDA error stays until the process ends; start it again",
        )
    return tuple(values)


def _free(runtime: Any, freed_by: list[tuple[str, Any]]) -> None:
    while freed_by:
        name, what = freed_by.pop()
        getattr(runtime, name)(what)
