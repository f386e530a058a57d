"""CUDA on host memory: names and arguments of the real cuda-python, late streams, honest captures; pycuda likewise."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.standins import alive, installed
from tests.unit.backends.conftest import conv_net
from tests.unit.standins.test_engine import Built, child, image


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    with installed("10.3"):
        yield importlib.import_module("cuda.bindings.runtime")


def ok(answer: tuple[Any, ...]) -> Any:
    assert int(answer[0]) == 0, answer
    return answer[1] if len(answer) == 2 else answer[1:]


def test_names_arguments_and_numbers_are_those_of_cuda_python():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed", exc_type=ImportError)
    with installed("10.3"):
        ours = importlib.import_module("cuda.bindings.runtime")
        assert ours is not real
        names = [name for name in vars(ours) if name.startswith("cuda")]
        assert len(names) > 50
        for name in names:
            mine, theirs = getattr(ours, name), getattr(real, name)
            if inspect.isfunction(mine):
                assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters), name
            elif hasattr(mine, "__members__"):
                for member, value in mine.__members__.items():
                    assert int(getattr(theirs, member)) == int(value), member
            elif isinstance(mine, int):
                assert mine == int(theirs), name
        properties = [name for name in vars(ours.cudaDeviceProp()) if not name.startswith("_")]
        assert set(properties) <= set(dir(real.cudaDeviceProp))
        for error in ours.cudaError_t:
            code = real.cudaError_t(int(error))
            assert ours.cudaGetErrorString(error)[1] == real.cudaGetErrorString(code)[1]
            assert ours.cudaGetErrorName(error)[1] == real.cudaGetErrorName(code)[1]


def test_failures_look_like_those_of_cuda_python_without_a_driver():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed", exc_type=ImportError)
    if int(real.cudaGetDeviceCount()[0]) != 35:
        pytest.skip("this machine has an NVIDIA driver")
    with installed("10.3", faults=["no-driver"]):
        ours = importlib.import_module("cuda.bindings.runtime")
        for name, *arguments in (
            ("cudaGetDeviceCount",), ("cudaDriverGetVersion",), ("cudaMemGetInfo",), ("cudaMalloc", 4), ("cudaFree", 0),
            ("cudaStreamCreate",), ("cudaGetDeviceProperties", 0), ("cudaStreamSynchronize", 0),
        ):  # fmt: skip
            mine, theirs = getattr(ours, name)(*arguments), getattr(real, name)(*arguments)
            assert [int(mine[0]), *mine[1:]] == [int(theirs[0]), *theirs[1:]], name


def test_the_device_is_the_one_that_was_asked_for():
    with installed("11.4", gpu="NVIDIA Thor", sm="11.0", memory_mib=1000):
        cuda = importlib.import_module("cuda.bindings.runtime")
        found = ok(cuda.cudaGetDeviceProperties(0))
        assert (found.name, found.major, found.minor, found.totalGlobalMem) == (b"NVIDIA Thor", 11, 0, 1000 << 20)
        assert int(cuda.cudaGetDeviceProperties(1)[0]) == 101
        address = ok(cuda.cudaMalloc(600 << 20))
        assert ok(cuda.cudaMemGetInfo()) == (400 << 20, 1000 << 20)
        assert cuda.cudaMalloc(401 << 20) == (cuda.cudaError_t.cudaErrorMemoryAllocation, None)
        ok(cuda.cudaFree(address))


def test_copies_run_when_somebody_waits_and_not_before(cuda):
    stream, address = ok(cuda.cudaStreamCreate()), ok(cuda.cudaMalloc(16))
    source, back = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    kinds = cuda.cudaMemcpyKind
    ok(cuda.cudaMemcpyAsync(address, source.ctypes.data, 16, kinds.cudaMemcpyHostToDevice, stream))
    ok(cuda.cudaMemcpyAsync(back.ctypes.data, address, 16, kinds.cudaMemcpyDeviceToHost, stream))
    assert int(cuda.cudaStreamQuery(stream)[0]) == 600
    source *= 2  # too early: the copy has not run
    assert not back.any()
    ok(cuda.cudaStreamSynchronize(stream))
    np.testing.assert_array_equal(back, [0, 2, 4, 6])
    assert alive() == {"device": 1, "pinned": 0, "streams": 1, "events": 0, "graphs": 0, "executables": 0}


def test_wrong_addresses_handles_and_directions_are_refused(cuda):
    kinds, host = cuda.cudaMemcpyKind, np.zeros(64, np.uint8)
    address = ok(cuda.cudaMalloc(16))
    assert int(cuda.cudaMemcpy(address, host.ctypes.data, 17, kinds.cudaMemcpyHostToDevice)[0]) == 1
    assert int(cuda.cudaMemcpy(host.ctypes.data, address + 8, 9, kinds.cudaMemcpyDeviceToHost)[0]) == 1
    assert int(cuda.cudaMemcpy(address, host.ctypes.data, 8, kinds.cudaMemcpyDeviceToHost)[0]) == 1
    assert int(cuda.cudaFreeHost(address)[0]) == 1
    assert int(cuda.cudaFree(address + 1)[0]) == 1
    assert int(cuda.cudaStreamSynchronize(12345)[0]) == 400
    with pytest.raises(TypeError, match="cudaMemcpyKind"):
        cuda.cudaMemcpy(address, host.ctypes.data, 8, 1)
    ok(cuda.cudaFree(address))
    assert int(cuda.cudaFree(address)[0]) == 1


def test_an_event_orders_two_streams(cuda):
    first, second = ok(cuda.cudaStreamCreate()), ok(cuda.cudaStreamCreate())
    address, event = ok(cuda.cudaMalloc(4)), ok(cuda.cudaEventCreate())
    value, back = np.ones(1, np.float32), np.zeros(1, np.float32)
    kinds = cuda.cudaMemcpyKind
    ok(cuda.cudaMemcpyAsync(address, value.ctypes.data, 4, kinds.cudaMemcpyHostToDevice, first))
    ok(cuda.cudaEventRecord(event, first))
    ok(cuda.cudaStreamWaitEvent(second, event, 0))
    ok(cuda.cudaMemcpyAsync(back.ctypes.data, address, 4, kinds.cudaMemcpyDeviceToHost, second))
    ok(cuda.cudaStreamSynchronize(second))
    assert back[0] == 1


class Context:
    """An opened engine with buffers, on a stream."""

    def __init__(self, trt: ModuleType, cuda: ModuleType) -> None:
        self.built = Built(trt, conv_net())
        self.context = self.built.load().create_execution_context()
        self.stream = ok(cuda.cudaStreamCreate())
        self.x = ok(cuda.cudaMalloc(image().nbytes))
        self.y = ok(cuda.cudaMalloc(16))
        self.context.set_tensor_address("image", self.x)
        self.context.set_tensor_address("features", self.y)

    def run(self) -> bool:
        return self.context.execute_async_v3(int(self.stream))


def test_a_captured_run_is_replayed_on_what_lies_in_its_buffers():
    with installed("10.3") as trt:
        cuda = importlib.import_module("cuda.bindings.runtime")
        kinds, mode = cuda.cudaMemcpyKind, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        made = Context(trt, cuda)
        found = []
        graph = None
        for scale in (1, 2, 3):
            values, back = image() * scale, np.zeros((1, 4), np.float32)
            ok(cuda.cudaMemcpy(made.x, values.ctypes.data, values.nbytes, kinds.cudaMemcpyHostToDevice))
            if scale == 1:
                assert made.run()
            else:
                if graph is None:
                    ok(cuda.cudaStreamBeginCapture(made.stream, mode))
                    assert made.run()
                    assert int(ok(cuda.cudaStreamIsCapturing(made.stream))) == 1
                    captured = ok(cuda.cudaStreamEndCapture(made.stream))
                    graph = ok(cuda.cudaGraphInstantiate(captured, 0))
                    ok(cuda.cudaGraphDestroy(captured))
                ok(cuda.cudaGraphLaunch(graph, made.stream))
            ok(cuda.cudaMemcpyAsync(back.ctypes.data, made.y, 16, kinds.cudaMemcpyDeviceToHost, made.stream))
            ok(cuda.cudaStreamSynchronize(made.stream))
            found.append(back)
        direct = []
        for scale in (1, 2, 3):
            values, back = image() * scale, np.zeros((1, 4), np.float32)
            ok(cuda.cudaMemcpy(made.x, values.ctypes.data, values.nbytes, kinds.cudaMemcpyHostToDevice))
            assert made.run()
            ok(cuda.cudaMemcpyAsync(back.ctypes.data, made.y, 16, kinds.cudaMemcpyDeviceToHost, made.stream))
            ok(cuda.cudaStreamSynchronize(made.stream))
            direct.append(back)
        np.testing.assert_array_equal(found, direct)
        assert not np.array_equal(direct[0], direct[1])


@pytest.mark.parametrize("mode", ["Global", "ThreadLocal"])
@pytest.mark.parametrize("call", ["cudaStreamSynchronize", "cudaMalloc", "cudaDeviceSynchronize"])
def test_waiting_and_allocating_spoil_a_capture(cuda, call, mode):
    stream = ok(cuda.cudaStreamCreate())
    ok(cuda.cudaStreamBeginCapture(stream, getattr(cuda.cudaStreamCaptureMode, f"cudaStreamCaptureMode{mode}")))
    arguments = {"cudaStreamSynchronize": (stream,), "cudaMalloc": (4,), "cudaDeviceSynchronize": ()}[call]
    assert int(getattr(cuda, call)(*arguments)[0]) == 900
    assert int(ok(cuda.cudaStreamIsCapturing(stream))) == 2
    assert cuda.cudaStreamEndCapture(stream) == (cuda.cudaError_t.cudaErrorStreamCaptureInvalidated, None)
    ok(cuda.cudaStreamSynchronize(stream))


def test_another_thread_may_allocate_beside_a_capture_of_this_thread(cuda):
    stream = ok(cuda.cudaStreamCreate())
    ok(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(cuda.cudaMalloc(4)))
    thread.start()
    thread.join()
    assert int(answers[0][0]) == 0
    ok(cuda.cudaStreamEndCapture(stream))


def test_the_default_stream_waits_for_blocking_streams_alone(cuda):
    kinds = cuda.cudaMemcpyKind
    for flags, waited in ((cuda.cudaStreamDefault, True), (cuda.cudaStreamNonBlocking, False)):
        stream, address = ok(cuda.cudaStreamCreateWithFlags(flags)), ok(cuda.cudaMalloc(4))
        value, back = np.ones(1, np.float32), np.zeros(1, np.float32)
        ok(cuda.cudaMemcpyAsync(address, value.ctypes.data, 4, kinds.cudaMemcpyHostToDevice, stream))
        ok(cuda.cudaMemcpy(back.ctypes.data, address, 4, kinds.cudaMemcpyDeviceToHost))
        assert (back[0] == 1) == waited
    ok(cuda.cudaDeviceSynchronize())
    assert int(cuda.cudaStreamCreateWithFlags(7)[0]) == 1


def test_a_capture_ends_in_the_thread_that_began_it(cuda):
    stream = ok(cuda.cudaStreamCreate())
    ok(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(cuda.cudaStreamEndCapture(stream)))
    thread.start()
    thread.join()
    assert int(answers[0][0]) == 908
    ok(cuda.cudaStreamEndCapture(stream))


def test_other_misuse_of_captures(cuda):
    stream = ok(cuda.cudaStreamCreate())
    assert int(cuda.cudaStreamEndCapture(stream)[0]) == 903
    assert int(cuda.cudaStreamBeginCapture(0, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)[0]) == 900
    address, value = ok(cuda.cudaMalloc(4)), np.ones(1, np.float32)
    ok(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
    copied = cuda.cudaMemcpy(address, value.ctypes.data, 4, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
    assert int(copied[0]) == 906
    assert int(cuda.cudaStreamEndCapture(stream)[0]) == 901


def test_a_context_that_has_not_run_cannot_be_captured():
    with installed("11.4") as trt:
        cuda = importlib.import_module("cuda.bindings.runtime")
        made = Context(trt, cuda)
        ok(cuda.cudaStreamBeginCapture(made.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
        assert not made.run()
        assert int(cuda.cudaStreamEndCapture(made.stream)[0]) == 901


def test_capture_fails_where_it_is_planted_and_running_goes_on():
    with installed("11.4", faults=["capture-fails"]) as trt:
        cuda = importlib.import_module("cuda.bindings.runtime")
        made = Context(trt, cuda)
        assert made.run()
        ok(cuda.cudaStreamSynchronize(made.stream))
        ok(cuda.cudaStreamBeginCapture(made.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
        assert not made.run()
        assert "not permitted when stream is capturing" in made.built.errors
        assert int(cuda.cudaStreamEndCapture(made.stream)[0]) == 901
        assert made.run()
        ok(cuda.cudaStreamSynchronize(made.stream))


def test_a_sticky_error_stays():
    with installed("11.4", faults=["sticky-error"]) as trt:
        cuda = importlib.import_module("cuda.bindings.runtime")
        made = Context(trt, cuda)
        assert made.run()
        assert int(cuda.cudaStreamSynchronize(made.stream)[0]) == 700
        assert int(cuda.cudaMalloc(4)[0]) == 700
        assert int(cuda.cudaGetLastError()[0]) == 700


def test_a_buffer_that_is_too_small_is_an_illegal_access():
    with installed("11.4") as trt:
        cuda = importlib.import_module("cuda.bindings.runtime")
        made = Context(trt, cuda)
        made.context.set_tensor_address("features", ok(cuda.cudaMalloc(8)))
        assert made.run()
        assert int(cuda.cudaStreamSynchronize(made.stream)[0]) == 700


def test_what_was_imported_before_is_back_afterwards():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed", exc_type=ImportError)
    with installed("10.3", faults=["no-cuda-python"]), pytest.raises(ModuleNotFoundError, match=r"cuda\.bindings"):
        importlib.import_module("cuda.bindings.runtime")
    assert importlib.import_module("cuda.bindings.runtime") is real


def test_pycuda_copies_through_a_current_context_and_frees_with_its_objects():
    with installed("10.3"):
        drv = importlib.import_module("pycuda.driver")
        with pytest.raises(drv.LogicError, match="cuDeviceGet failed: initialization error"):
            drv.Device(0)
        drv.init()
        assert drv.Device(0).compute_capability() == (8, 7)
        with pytest.raises(drv.LogicError, match="cuMemAlloc failed: invalid device context"):
            drv.mem_alloc(16)
        drv.Device(0).retain_primary_context().push()
        stream, memory, pinned = drv.Stream(), drv.mem_alloc(16), drv.pagelocked_empty((2, 2), np.float32)
        pinned[:] = [[1, 2], [3, 4]]
        back = np.zeros(4, np.float32)
        drv.memcpy_htod_async(memory, pinned, stream)
        drv.memcpy_dtoh_async(back, int(memory), stream)
        assert not back.any()
        stream.synchronize()
        np.testing.assert_array_equal(back, [1, 2, 3, 4])
        with pytest.raises(drv.LogicError, match="cuMemcpyHtoD failed: invalid argument"):
            drv.memcpy_htod(memory, np.zeros(17, np.uint8))
        with pytest.raises(drv.MemoryError, match="cuMemAlloc failed: out of memory"):
            drv.mem_alloc(1 << 50)
        with pytest.raises(TypeError, match="did not match"):
            drv.mem_alloc(1.5)
        memory.free()
        pinned.base.free()
        del stream, pinned
        drv.Context.pop()
        assert not any(alive().values())
        assert not hasattr(drv, "Graph")


def test_a_process_that_leaves_a_pycuda_context_behind_is_aborted():
    push = "import pycuda.driver as d; d.init(); c = d.Device(0).retain_primary_context(); c.push();"
    left = child(
        ["-c", f"import threading\ndef f():\n    {push}\nt = threading.Thread(target=f); t.start(); t.join()"], "10.3"
    )
    assert left.returncode == -6
    assert "context stack was not empty" in left.stderr
    assert child(["-c", f"{push} d.Context.pop()"], "10.3").returncode == 0
    assert child(["-c", "import pycuda.autoinit, pycuda.driver as d; d.mem_alloc(4).free()"], "10.3").returncode == 0


def test_pycuda_without_gpu_driver_or_itself():
    with installed("10.3", faults=["no-gpu"]):
        drv = importlib.import_module("pycuda.driver")
        with pytest.raises(drv.RuntimeError, match="cuInit failed: no CUDA-capable device is detected"):
            drv.init()
    with installed("10.3", faults=["no-driver"]), pytest.raises(ImportError, match=r"libcuda\.so\.1"):
        importlib.import_module("pycuda.driver")
    with installed("10.3", faults=["no-pycuda"]), pytest.raises(ModuleNotFoundError, match="pycuda"):
        importlib.import_module("pycuda.driver")
