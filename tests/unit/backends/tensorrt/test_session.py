"""A session's traffic, on a stand-in for CUDA and an engine that doubles its input; names as in the real modules."""

from __future__ import annotations

import ctypes
import enum
import gc
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from vlaopt.backends import DeviceTime, Port, Resident, Timing
from vlaopt.backends.tensorrt.cuda import Stream
from vlaopt.backends.tensorrt.cuda_libraries import CudaPython
from vlaopt.backends.tensorrt.session import TensorRtSession
from vlaopt.errors import EnvironmentProblem, InputError, StageError


class Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Cuda:
    """`cuda.bindings.runtime` on host memory: every call answers a tuple that starts with its error code."""

    cudaError_t = enum.IntEnum(
        "cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorStreamCaptureInvalidated": 901}
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
    )

    def __init__(self, full_after: int = 99, *, captures: bool = True) -> None:
        self.memory: dict[int, object] = {}
        self.graphs: dict[int, list] = {}
        self.captures = captures
        self.recorded: list | None = None
        self.launches = 0
        self.full_after = full_after
        self.streams = 0
        self.copies: list[str] = []
        self.events: dict[int, float] = {}
        self.clock_ms = 0.0

    cudaStreamNonBlocking = 1

    def cudaStreamCreateWithFlags(self, flags):
        self.streams += 1
        return self.cudaError_t.cudaSuccess, 7

    def cudaStreamDestroy(self, stream):
        self.streams -= 1
        return (self.cudaError_t.cudaSuccess,)

    def cudaMalloc(self, size):
        if len(self.memory) >= self.full_after:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return self.cudaError_t.cudaSuccess, ctypes.addressof(block)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address):
        del self.memory[address]
        return (self.cudaError_t.cudaSuccess,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        self.copies.append(kind.name.removeprefix("cudaMemcpy"))
        self.queue(lambda: ctypes.memmove(to, source, size))
        self.clock_ms += 1
        return (self.cudaError_t.cudaSuccess,)

    def queue(self, work) -> None:
        """Work of a stream: done at once, or kept while the stream is captured."""
        work() if self.recorded is None else self.recorded.append(work)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self.recorded is None
        self.recorded = []
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.recorded = self.recorded, None
        if not self.captures:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        self.graphs[len(self.graphs) + 1] = recorded
        return self.cudaError_t.cudaSuccess, len(self.graphs)

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs[-graph] = self.graphs[graph]
        return self.cudaError_t.cudaSuccess, -graph

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in self.graphs[graph]:
            work()
        return (self.cudaError_t.cudaSuccess,)

    def cudaEventCreate(self):
        self.events[len(self.events) + 1] = math.nan
        return self.cudaError_t.cudaSuccess, len(self.events)

    def cudaEventRecord(self, event, stream):
        assert self.recorded is None, "an event of a capture tells no time"
        self.events[event] = self.clock_ms
        return (self.cudaError_t.cudaSuccess,)

    def cudaEventElapsedTime(self, start, end):
        return self.cudaError_t.cudaSuccess, self.events[end] - self.events[start]

    def cudaEventDestroy(self, event):
        del self.events[event]
        return (self.cudaError_t.cudaSuccess,)

    def cudaGetLastError(self):
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert self.recorded is None, "a capture does not survive a wait"
        return (self.cudaError_t.cudaSuccess,)

    def cudaGetErrorString(self, code):
        texts = {2: b"out of memory", 901: b"operation failed due to a previous error during capture"}
        return self.cudaError_t.cudaSuccess, texts[code]


class Engine:
    num_io_tensors = 2

    def __init__(self, shape=(1, 3), kind="FLOAT", most=(4, 3)) -> None:
        self.shape, self.kind, self.most = shape, kind, most

    def get_tensor_name(self, index):
        return ("x", "y")[index]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.kind)

    def get_tensor_shape(self, name):
        return self.shape

    def get_tensor_profile_shape(self, name, profile):
        return [(2, 3), (2, 3), self.most]


class Context:
    """Doubles `x` into `y`."""

    def __init__(self, cuda: Cuda, shape=(1, 3), *, runs: bool = True) -> None:
        self.cuda, self.shape, self.runs = cuda, shape, runs
        self.addresses: dict[str, int] = {}
        self.runs_seen = 0

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def execute_async_v3(self, stream):
        size = 4 * math.prod(self.shape)

        def double():
            self.runs_seen += 1
            self.cuda.clock_ms += 10
            views = {
                n: np.frombuffer((ctypes.c_byte * size).from_address(a), np.float32) for n, a in self.addresses.items()
            }
            views["y"][:] = 2 * views["x"]

        self.cuda.queue(double)
        return self.runs


TRT = SimpleNamespace(TensorIOMode=Mode)


def session(cuda: Cuda, engine: Engine | None = None, context: Context | None = None, **options) -> TensorRtSession:
    return TensorRtSession(TRT, engine or Engine(), context or Context(cuda), Stream(CudaPython(cuda)), **options)


def x(*rows: float) -> dict[str, np.ndarray]:
    return {"x": np.array([[row] * 3 for row in rows], np.float32)}


def test_feeds_travel_to_the_device_and_outputs_come_back_as_copies():
    opened = session(Cuda())
    assert opened.inputs == (Port("x", "float32", (1, 3)),)
    first = opened.run({"x": np.array([[1, 2, 3]], np.float32)})["y"]
    opened.run({"x": np.zeros((1, 3), np.float32)})
    assert first.tolist() == [[2, 4, 6]]


def test_a_resident_output_goes_from_session_to_session_on_the_device_and_only_once():
    cuda = Cuda()
    first, second = session(cuda), session(cuda)
    kept = first.run({"x": np.array([[1, 2, 3]], np.float32)}, resident=("y",))
    assert cuda.copies == ["HostToDevice"]
    cuda.copies.clear()
    assert [second.run({"x": kept["y"]})["y"].tolist() for _ in range(3)] == [[[4, 8, 12]]] * 3
    assert cuda.copies == ["DeviceToDevice", *["DeviceToHost"] * 3]
    again = first.run({"x": np.array([[5, 5, 5]], np.float32)}, resident=("y",))
    assert second.run({"x": again["y"]})["y"].tolist() == [[20, 20, 20]]
    assert second.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2, 2, 2]]
    assert second.run({"x": again["y"]})["y"].tolist() == [[20, 20, 20]]


def test_a_session_takes_its_own_resident_output():
    opened = session(Cuda())
    value = np.ones((1, 3), np.float32)
    for _ in range(4):
        value = opened.run({"x": value}, resident=("y",))["y"]
    assert opened.run({"x": value})["y"].tolist() == [[32, 32, 32]]


def test_a_resident_of_another_backend_is_refused():
    with pytest.raises(InputError, match="'x' stays in the memory of openvino"):
        session(Cuda()).run({"x": Resident("openvino", "float32", (1, 3), None)})


def test_wrong_feeds_are_refused_by_name():
    with pytest.raises(InputError, match="input 'x' has dtype float64"):
        session(Cuda()).run({"x": np.zeros((1, 3))})


def test_an_engine_that_refuses_to_run_is_an_error():
    cuda = Cuda()
    with pytest.raises(StageError, match="refused to run"):
        session(cuda, context=Context(cuda, runs=False)).run(x(0))


@pytest.mark.parametrize(
    ("engine", "message"),
    [(Engine(kind="FP4"), "'x' is FP4, which numpy cannot hold"), (Engine(kind="E8M0"), "'x' is E8M0")],
)
def test_what_numpy_cannot_hold_is_refused(engine, message):
    with pytest.raises(InputError, match=message):
        session(Cuda(), engine=engine)


def test_memory_that_runs_out_is_told_with_cudas_reason_and_the_rest_is_freed():
    cuda = Cuda(full_after=3)
    with pytest.raises(EnvironmentProblem, match="CUDA error 2: out of memory") as caught:
        session(cuda)
    assert "free memory" in caught.value.hint
    assert (cuda.memory, cuda.streams) == ({}, 0)  # although the error, and with it the session, is still held


def test_everything_is_freed_with_the_session():
    cuda = Cuda()
    opened = session(cuda)
    assert len(cuda.memory) == 4
    del opened
    gc.collect()
    assert not cuda.memory
    assert cuda.streams == 0


def test_a_closed_session_has_freed_everything_and_says_so_when_it_is_run():
    cuda = Cuda()
    opened = session(cuda, cuda_graph=True)
    opened.run(x(1))
    opened.close()
    assert (cuda.memory, cuda.streams, cuda.graphs) == ({}, 0, {})
    with pytest.raises(InputError, match="session is closed"):
        opened.run(x(1))


def test_what_the_first_run_queued_is_captured_and_then_launched():
    cuda = Cuda()
    context = Context(cuda)
    opened = session(cuda, context=context, cuda_graph=True)
    assert [opened.run(x(value))["y"][0, 0] for value in (1, 2, 3)] == [2, 4, 6]
    assert opened.told == ("as a CUDA graph",)
    assert (cuda.launches, context.runs_seen) == (2, 3)


def test_without_the_wish_nothing_is_captured_or_told():
    cuda = Cuda()
    opened = session(cuda)
    assert [opened.run(x(value))["y"][0, 0] for value in (1, 2)] == [2, 4]
    assert (cuda.launches, opened.told) == (0, ())


def test_a_capture_that_fails_is_told_and_the_session_runs_on():
    cuda = Cuda(captures=False)
    opened = session(cuda, cuda_graph=True)
    assert [opened.run(x(value))["y"][0, 0] for value in (1, 2, 3)] == [2, 4, 6]
    assert opened.told == (
        "without a CUDA graph: CUDA error 901: operation failed due to a previous error during capture",
    )
    opened.close()
    assert (cuda.memory, cuda.streams, cuda.graphs) == ({}, 0, {})


def test_an_engine_that_refuses_to_be_captured_leaves_the_stream_usable():
    cuda = Cuda()
    context = Context(cuda)
    opened = session(cuda, context=context, cuda_graph=True)
    enqueue, context.execute_async_v3 = context.execute_async_v3, lambda stream: cuda.recorded is None
    opened.run(x(1))
    context.execute_async_v3 = enqueue
    assert opened.told == ("without a CUDA graph: TensorRT refused to run the engine",)
    assert opened.run(x(4))["y"][0, 0] == 8
    opened.close()
    assert (cuda.memory, cuda.graphs) == ({}, {})


def test_device_times_are_those_of_copies_and_of_the_run_between_them():
    cuda = Cuda()
    opened = session(cuda)
    assert isinstance(opened, Timing)
    with opened.device_times() as times:
        kept = opened.run(x(1), resident=("y",))
        assert opened.run({"x": kept["y"]})["y"].tolist() == [[4] * 3]
        assert opened.run({"x": kept["y"]}, resident=("y",))["y"].shape == (1, 3)
    # In; over and out; neither, for what was taken once stays.
    assert times == [DeviceTime(10, 1), DeviceTime(10, 2), DeviceTime(10, 0)]


def test_device_times_are_taken_where_they_are_asked_for_and_of_graphs_too():
    cuda = Cuda()
    opened = session(cuda, cuda_graph=True)
    assert opened.run(x(1))["y"][0, 0] == 2
    assert not cuda.events
    for value in (2, 3):
        with opened.device_times() as times:
            assert opened.run(x(value))["y"][0, 0] == 2 * value
        assert opened.run(x(1))["y"][0, 0] == 2
        assert times == [DeviceTime(10, 2)]
    assert (cuda.launches, len(cuda.events)) == (4, 4)
    opened.close()
    assert cuda.events == {}
    with pytest.raises(InputError, match="session is closed"), opened.device_times():
        pass


def test_a_timed_run_never_captures():
    cuda = Cuda()
    opened = session(cuda, cuda_graph=True)
    with opened.device_times() as times:
        assert opened.run(x(1))["y"][0, 0] == 2
    assert (times, opened.told) == ([DeviceTime(10, 2)], ())
    opened.run(x(1))
    assert opened.told == ("as a CUDA graph",)


def test_shapes_change_from_run_to_run_within_the_profile():
    cuda = Cuda()
    opened = session(cuda, Engine(shape=(-1, 3)), cuda_graph=True)
    assert opened.inputs == (Port("x", "float32", (-1, 3)),)
    assert opened.run(x(1, 2))["y"].tolist() == [[2] * 3, [4] * 3]
    assert opened.run(x(1, 2, 3, 4))["y"].shape == (4, 3)
    assert opened.run(x(5, 6))["y"].tolist() == [[10] * 3, [12] * 3]
    assert opened.told == ("without a CUDA graph: its shapes are dynamic",)


def test_a_resident_of_a_smaller_shape_is_taken_with_its_shape():
    cuda = Cuda()
    first, second = (session(cuda, Engine(shape=(-1, 3))) for _ in range(2))
    first.run(x(7, 7, 7, 7))
    kept = first.run(x(1, 2), resident=("y",))
    assert second.run({"x": kept["y"]})["y"].tolist() == [[4] * 3, [8] * 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [(1, "dimension 0 of input 'x' is 1; .* for 2 to 4"), (5, "is 5; .* 2 to 4"), (0, r"shape \(0, 3\)")],
)
def test_a_shape_outside_the_profile_is_refused_by_dimension(rows, message):
    opened = session(Cuda(), Engine(shape=(-1, 3)))
    with pytest.raises(InputError, match=message):
        opened.run({"x": np.zeros((rows, 3), np.float32)})


def test_an_output_that_outgrows_its_buffer_is_refused_before_it_is_written():
    cuda = Cuda()
    context = Context(cuda)
    opened = session(cuda, Engine(shape=(-1, 3)), context)
    context.get_tensor_shape = lambda name: (99, 3)
    for _ in range(2):
        with pytest.raises(StageError, match="'y' is larger than at the largest shapes"):
            opened.run(x(1, 2))
    assert context.runs_seen == 0


def test_bfloat16_is_a_port_where_numpy_knows_it():
    pytest.importorskip("ml_dtypes")
    assert session(Cuda(), Engine(kind="BF16")).inputs == (Port("x", "bfloat16", (1, 3)),)


def test_a_second_thread_is_refused_while_the_first_one_runs():
    cuda = Cuda()
    context = Context(cuda)
    opened = session(cuda, context=context)
    inside, go_on = threading.Event(), threading.Event()

    def slow(stream):
        inside.set()
        return go_on.wait(10)

    context.execute_async_v3 = slow
    first = threading.Thread(target=opened.run, args=(x(1),))
    first.start()
    assert inside.wait(10)
    with pytest.raises(InputError, match="used by two threads at once") as caught:
        opened.run(x(2))
    go_on.set()
    first.join()
    assert caught.value.hint == "open the policy once in each thread"
    opened.run(x(2))
