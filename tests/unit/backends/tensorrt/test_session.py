"""A session's traffic, on a stand-in for CUDA and an engine that doubles its input; names as in the real modules."""

from __future__ import annotations

import ctypes
import enum
import gc
from types import SimpleNamespace

import numpy as np
import pytest

from vlaopt.backends import Port, Resident
from vlaopt.backends.tensorrt.cuda import Stream
from vlaopt.backends.tensorrt.session import TensorRtSession
from vlaopt.errors import EnvironmentProblem, InputError, StageError


class Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Cuda:
    """`cuda.bindings.runtime` on host memory: every call answers a tuple that starts with its error code."""

    cudaError_t = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
    )

    def __init__(self, full_after: int = 99) -> None:
        self.memory: dict[int, object] = {}
        self.full_after = full_after
        self.streams = 0
        self.copies: list[str] = []

    def cudaStreamCreate(self):
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
        ctypes.memmove(to, source, size)
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        return (self.cudaError_t.cudaSuccess,)

    def cudaGetErrorString(self, code):
        return self.cudaError_t.cudaSuccess, b"out of memory"


class Engine:
    num_io_tensors = 2

    def __init__(self, shape=(1, 3), kind="FLOAT") -> None:
        self.shape, self.kind = shape, kind

    def get_tensor_name(self, index):
        return ("x", "y")[index]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.kind)

    def get_tensor_shape(self, name):
        return self.shape


class Context:
    def __init__(self, *, runs: bool = True) -> None:
        self.addresses: dict[str, int] = {}
        self.runs = runs

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        views = {n: np.frombuffer((ctypes.c_byte * 12).from_address(a), np.float32) for n, a in self.addresses.items()}
        views["y"][:] = 2 * views["x"]
        return self.runs


def session(cuda: Cuda, engine: Engine | None = None, context: Context | None = None) -> TensorRtSession:
    trt = SimpleNamespace(TensorIOMode=Mode)
    return TensorRtSession(trt, engine or Engine(), context or Context(), Stream(cuda))


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
    with pytest.raises(StageError, match="refused to run"):
        session(Cuda(), context=Context(runs=False)).run({"x": np.zeros((1, 3), np.float32)})


@pytest.mark.parametrize(
    ("engine", "message"),
    [(Engine(shape=(-1, 3)), "'x' has the dynamic shape"), (Engine(kind="BF16"), "'x' is BF16")],
)
def test_what_numpy_cannot_hold_is_refused(engine, message):
    with pytest.raises(InputError, match=message):
        session(Cuda(), engine=engine)


def test_memory_that_runs_out_is_told_with_cudas_reason_and_the_rest_is_freed():
    cuda = Cuda(full_after=3)
    with pytest.raises(EnvironmentProblem, match="CUDA error 2: out of memory"):
        session(cuda)
    gc.collect()
    assert not cuda.memory


def test_everything_is_freed_with_the_session():
    cuda = Cuda()
    opened = session(cuda)
    assert len(cuda.memory) == 4
    del opened
    gc.collect()
    assert not cuda.memory
    assert cuda.streams == 0
