"""A CUDA device of host memory: allocations that are counted, streams that run late, capture into graphs.

What is queued on a stream runs only when somebody waits for it, so that code that forgot to wait reads old values.
Error numbers are those of `cudaError_t`.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from standin.settings import settings

Work = Callable[[], None]

SUCCESS, INVALID_VALUE, MEMORY, INSUFFICIENT_DRIVER, NO_DEVICE, INVALID_DEVICE = 0, 1, 2, 35, 100, 101
INVALID_HANDLE, NOT_READY, ILLEGAL_ADDRESS = 400, 600, 700
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_UNMATCHED, CAPTURE_IMPLICIT = 900, 901, 903, 906
CAPTURE_WRONG_THREAD = 908
GLOBAL_MODE, THREAD_MODE, RELAXED_MODE = 0, 1, 2

_RUBBISH = 1 << 24  # bytes; the rest of a larger allocation costs no memory before it is used


class CudaError(Exception):
    """A call that fails with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"CUDA error {code}")
        self.code = code


@dataclass
class Stream:
    handle: int
    blocking: bool = True  # waits for the default stream, and that for it
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    mode: int = GLOBAL_MODE
    thread: int = 0
    broken: bool = False  # a capture that an illegal call has spoiled

    @property
    def capturing(self) -> bool:
        return self.captured is not None


@dataclass
class Event:
    handle: int
    stream: Stream | None = None
    recorded: bool = False
    done: bool = True
    at_ns: int = 0


@dataclass(frozen=True)
class Graph:
    handle: int
    work: tuple[Work, ...]


class Device:
    """The one GPU of this process."""

    def __init__(self) -> None:
        self._count = itertools.count(0x10)
        self._memory: dict[int, tuple[np.ndarray, str, int]] = {}
        self._starts: list[int] = []
        self.streams: dict[int, Stream] = {0: Stream(0)}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, Graph] = {}
        self.executables: dict[int, Graph] = {}
        self.sticky = SUCCESS

    # memory

    def allocate(self, size: int, where: str) -> int:
        """The address of `size` bytes on the "device" or "pinned" on the host. Raises CudaError."""
        self.refuse_while_capturing()
        if size < 0:
            raise CudaError(INVALID_VALUE)
        if where == "device" and (settings().has("out-of-memory") or size > self.free_bytes):
            raise CudaError(MEMORY)
        memory = np.empty(max(size, 1), np.uint8)
        memory[:_RUBBISH] = 0xA5  # as fresh memory holds
        address = memory.ctypes.data
        self._memory[address] = (memory, where, size)
        bisect.insort(self._starts, address)
        return address

    def free(self, address: int, where: str) -> None:
        """Raises CudaError for an address that `allocate` did not give, or gave elsewhere."""
        self.refuse_while_capturing()
        if address == 0:
            return
        self.drain_all()
        if address not in self._memory or self._memory[address][1] != where:
            raise CudaError(INVALID_VALUE)
        del self._memory[address]
        self._starts.remove(address)

    @property
    def total_bytes(self) -> int:
        return settings().memory_mib << 20

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - sum(size for _, where, size in self._memory.values() if where == "device")

    def alive(self) -> dict[str, int]:
        """How much of each kind is not freed yet: a test asks whether anything leaks."""
        kinds = [where for _, where, _ in self._memory.values()]
        counts = {where: kinds.count(where) for where in ("device", "pinned")}
        counts |= {"streams": len(self.streams) - 1, "events": len(self.events)}
        return counts | {"graphs": len(self.graphs), "executables": len(self.executables)}

    def check_range(self, address: int, size: int, where: str) -> None:
        """Raises CudaError unless these bytes lie in one allocation of this kind."""
        index = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else -1
        if index < 0 or self._memory[start][1] != where or address + size > start + self._memory[start][2]:
            raise CudaError(INVALID_VALUE)

    def is_device(self, address: int) -> bool:
        index = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else -1
        return index >= 0 and self._memory[start][1] == "device" and address < start + max(self._memory[start][2], 1)

    # streams

    def new_handle(self) -> int:
        return next(self._count) << 4

    def stream(self, handle: int) -> Stream:
        """Raises CudaError for a stream that is not, or is gone."""
        if handle not in self.streams:
            raise CudaError(INVALID_HANDLE)
        return self.streams[handle]

    def make_stream(self, *, blocking: bool = True) -> int:
        handle = self.new_handle()
        self.streams[handle] = Stream(handle, blocking)
        return handle

    def destroy_stream(self, handle: int) -> None:
        self.wait(handle)
        if handle == 0:
            raise CudaError(INVALID_HANDLE)
        del self.streams[handle]

    def enqueue(self, handle: int, work: Work) -> None:
        """Put work on a stream, or into its capture."""
        stream = self.stream(handle)
        if stream.captured is not None:
            if stream.broken:
                raise CudaError(CAPTURE_INVALIDATED)
            stream.captured.append(work)
        elif handle == 0:
            capturing = [other for other in self.streams.values() if other.capturing and other.blocking]
            for other in capturing:
                other.broken = True
            if capturing:
                raise CudaError(CAPTURE_IMPLICIT)
            self._drain_blocking()
            work()
        else:
            stream.queue.append(work)

    def wait(self, handle: int) -> None:
        """Run what is queued on a stream. Raises CudaError where that is not allowed, or has failed."""
        stream = self.stream(handle)
        if stream.capturing:
            stream.broken = True
            raise CudaError(CAPTURE_UNSUPPORTED)
        if handle == 0:
            self._drain_blocking()
        self.drain(stream)
        self.raise_sticky()

    def wait_all(self) -> None:
        self.refuse_while_capturing()
        self.drain_all()
        self.raise_sticky()

    def drain(self, stream: Stream) -> None:
        while stream.queue:
            stream.queue.pop(0)()

    def drain_all(self) -> None:
        for stream in list(self.streams.values()):
            self.drain(stream)

    def _drain_blocking(self) -> None:
        """What work on the default stream waits for."""
        for stream in list(self.streams.values()):
            if stream.blocking:
                self.drain(stream)

    def raise_sticky(self) -> None:
        if self.sticky:
            raise CudaError(self.sticky)

    # capture

    def refuse_while_capturing(self) -> None:
        """Spoil every capture that forbids this thread to wait or allocate meanwhile, as its mode says."""
        here = threading.get_ident()
        spoiled = [
            stream
            for stream in self.streams.values()
            if stream.capturing
            and (stream.mode == GLOBAL_MODE or (stream.mode == THREAD_MODE and stream.thread == here))
        ]
        for stream in spoiled:
            stream.broken = True
        if spoiled:
            raise CudaError(CAPTURE_UNSUPPORTED)

    def begin_capture(self, handle: int, mode: int) -> None:
        stream = self.stream(handle)
        if handle == 0:
            raise CudaError(CAPTURE_UNSUPPORTED)
        if stream.capturing:
            raise CudaError(INVALID_VALUE)
        stream.captured, stream.mode, stream.broken = [], mode, False
        stream.thread = threading.get_ident()

    def end_capture(self, handle: int) -> int:
        stream = self.stream(handle)
        if stream.captured is None:
            raise CudaError(CAPTURE_UNMATCHED)
        if stream.mode != RELAXED_MODE and stream.thread != threading.get_ident():
            raise CudaError(CAPTURE_WRONG_THREAD)
        work, stream.captured = stream.captured, None
        if stream.broken:
            raise CudaError(CAPTURE_INVALIDATED)
        graph = Graph(self.new_handle(), tuple(work))
        self.graphs[graph.handle] = graph
        return graph.handle

    def instantiate(self, handle: int) -> int:
        if handle not in self.graphs:
            raise CudaError(INVALID_VALUE)
        if settings().has("instantiate-fails"):
            raise CudaError(MEMORY)
        made = Graph(self.new_handle(), self.graphs[handle].work)
        self.executables[made.handle] = made
        return made.handle

    def launch(self, handle: int, stream: int) -> None:
        if handle not in self.executables:
            raise CudaError(INVALID_VALUE)
        for work in self.executables[handle].work:
            self.enqueue(stream, work)


DEVICE = Device()
