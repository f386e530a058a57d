"""CUDA on this machine, and the memory of one session: buffers in pairs (pinned host, device) on one stream.

Everything goes through cuda-python or pycuda, whichever is installed (`cuda_libraries`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaopt.backends.tensorrt.cuda_libraries import Device, Library, cuda_library
from vlaopt.errors import EnvironmentProblem, VlaoptError

__all__ = ["Buffer", "Capture", "Device", "Stream", "device", "free_memory_mib", "problem"]


def problem() -> str | None:
    """Why CUDA cannot be used here, in one line: no library, no driver, no GPU. None where it can."""
    try:
        found = cuda_library().devices()
    except EnvironmentProblem as error:
        told = error.message
        return told if told.startswith(("no ", "CUDA cannot")) else f"no usable NVIDIA driver: {told}"
    return None if found else "the NVIDIA driver sees no GPU"


def device() -> Device:
    """The first GPU. Raises EnvironmentProblem where there is none."""
    return cuda_library().device()


def free_memory_mib() -> int:
    """What the first GPU has free. On one that shares memory with the CPU, the system may have less to give."""
    return cuda_library().free_memory() >> 20


@dataclass(frozen=True)
class Buffer:
    """One tensor in both memories: `host` is a numpy view of pinned memory, `device` an address.

    A smaller shape lies at the start of both.
    """

    host: np.ndarray
    device: int

    def view(self, shape: tuple[int, ...]) -> np.ndarray:
        """The host's memory as `shape`, of no more elements than the buffer has."""
        if shape == self.host.shape:
            return self.host
        return self.host.reshape(-1)[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


@dataclass(frozen=True)
class Capture:
    """What was queued on a stream while it was captured; `launch` queues all of it again, at once."""

    launch: Callable[[], None]


class Stream:
    """A CUDA stream and the buffers, captures and events made on it; all are freed with it. One thread at a time."""

    def __init__(self, library: Library | None = None) -> None:
        self.library = library or cuda_library()
        self._frees: list[Callable[[], Any]] = []
        self._finalizer = weakref.finalize(self, _free, self._frees)
        self.handle = self._kept(self.library.stream())

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer for `shape`. Raises EnvironmentProblem when memory runs out."""
        count = int(np.prod(shape, dtype=np.int64))
        size = max(count * np.dtype(dtype).itemsize, 1)
        address = self._kept(self.library.memory(size))
        pinned = self._kept(self.library.pinned(size))
        return Buffer(pinned[: count * np.dtype(dtype).itemsize].view(dtype).reshape(shape), address)

    def upload(self, buffer: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Queue the copy of `buffer`, or of its first elements as `shape`, to the device."""
        self.library.upload(buffer.device, _part(buffer, shape), self.handle)

    def download(self, buffer: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Queue the copy of `buffer`, or of its first elements as `shape`, to the host; complete after `wait`."""
        self.library.download(_part(buffer, shape), buffer.device, self.handle)

    def copy(self, source: Buffer, to: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Queue the copy of `source` into `to`, or of its first elements as `shape`, on the device."""
        self.library.copy(to.device, source.device, _part(source, shape).nbytes, self.handle)

    def wait(self) -> None:
        """Until all that was queued is done."""
        self.library.wait(self.handle)

    def capture(self, queue: Callable[[], None]) -> Capture:
        """What `queue` puts on the stream, without running it.

        Raises EnvironmentProblem with CUDA's reason where it cannot be captured, and what `queue` raises; the stream
        can be used on.
        """
        self.library.begin(self.handle)
        try:
            queue()
        except VlaoptError:
            self._abandon()
            raise
        graph = self._kept(self.library.end(self.handle))
        return Capture(lambda: self.library.launch(graph, self.handle))

    def event(self) -> Any:
        """What `record` marks a moment of the stream with."""
        return self._kept(self.library.event())

    def record(self, event: Any) -> None:
        """Queue `event`: its moment is when the device has done what was queued before. Not inside a capture."""
        self.library.record(event, self.handle)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """From one event to another by the device's clock, to about 0.5 µs, once `wait` came back."""
        return self.library.elapsed_ms(first, last)

    def close(self) -> None:
        """Free everything in the opposite order of its making. The buffers' memory must not be touched after it."""
        self._finalizer()

    def _abandon(self) -> None:
        try:
            _, free = self.library.end(self.handle)
        except EnvironmentProblem:
            return  # as it must be: the capture was spoilt
        free()

    def _kept(self, made: tuple[Any, Callable[[], Any]]) -> Any:
        what, free = made
        self._frees.append(free)
        return what


def _part(buffer: Buffer, shape: tuple[int, ...] | None) -> np.ndarray:
    return buffer.host if shape is None else buffer.view(shape)


def _free(frees: list[Callable[[], Any]]) -> None:
    while frees:
        with contextlib.suppress(EnvironmentProblem):  # after a sticky error nothing can be freed, and all of it is
            frees.pop()()
