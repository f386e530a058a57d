"""CUDA through either of its libraries: why it cannot be used, what a GPU is, and errors with CUDA's own text."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from vlaopt.backends.tensorrt import cuda
from vlaopt.backends.tensorrt.cuda_libraries import CudaPython, PyCuda, cuda_library
from vlaopt.errors import EnvironmentProblem

real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed", exc_type=ImportError)
without_driver = pytest.mark.skipif(cuda.problem() is None, reason="this machine has an NVIDIA driver")


class Driver(ModuleType):
    """`pycuda.driver` on host memory: refuses what is called without a current context, as the real one does."""

    Error = type("Error", (Exception,), {})
    MemoryError = type("MemoryError", (Error,), {})
    LogicError = type("LogicError", (Error,), {})
    LaunchError = type("LaunchError", (Error,), {})
    device_attribute = SimpleNamespace(INTEGRATED="integrated")

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.initialised = False
        self.stack: list[object] = []
        self.living: list[object] = []
        self.fails: Exception | None = None
        self.clock_ms = itertools.count(10, 4)
        self.Context = SimpleNamespace(pop=self.stack.pop)
        self.Device = type(
            "Device",
            (),
            {
                "__init__": lambda device, index: None,
                "count": staticmethod(lambda: 1),
                "name": lambda device: "Orin",
                "compute_capability": lambda device: (8, 7),
                "total_memory": lambda device: 30 << 30,
                "get_attribute": lambda device, attribute: 1 if attribute == "integrated" else 0,
                "retain_primary_context": lambda device: SimpleNamespace(push=lambda: self.stack.append("primary")),
            },
        )

    def init(self):
        if isinstance(self.fails, Driver.LogicError):
            raise self.fails
        self.initialised = True

    def get_driver_version(self):
        return 12060

    def current(self):
        assert self.stack, "no context is current"
        if self.fails:
            raise self.fails

    def mem_get_info(self):
        self.current()
        return 5 << 30, 30 << 30

    def Stream(self):
        self.current()
        driver = self
        token = object()
        self.living.append(token)

        class Made:
            handle = 7

            def synchronize(self):
                driver.current()

            def __del__(self):
                driver.living.remove(token)

        return Made()

    def Event(self):
        self.current()
        driver = self
        token = object()
        self.living.append(token)

        class Made:
            def record(self, stream):
                driver.current()
                assert stream.handle == 7
                self.at_ms = next(driver.clock_ms)

            def time_since(self, event):
                driver.current()
                return self.at_ms - event.at_ms

            def __del__(self):
                driver.current()
                driver.living.remove(token)

        return Made()

    def mem_alloc(self, size):
        self.current()
        return Allocation(self, size)

    def pagelocked_empty(self, size, dtype):
        self.current()
        return np.asarray(Allocation(self, size))

    def memcpy_htod_async(self, to, source, stream):
        self.current()
        self.at(to)[: source.nbytes] = source

    def memcpy_dtoh_async(self, to, source, stream):
        self.current()
        to[:] = self.at(source)[: to.nbytes]

    def memcpy_dtod_async(self, to, source, size, stream):
        self.current()
        self.at(to)[:size] = self.at(source)[:size]

    def at(self, address):
        return next(a for a in self.living if isinstance(a, Allocation) and int(a) == address).memory


class Allocation:
    def __init__(self, driver, size) -> None:
        self.driver, self.memory = driver, np.zeros(size, np.uint8)
        self.__array_interface__ = self.memory.__array_interface__
        driver.living.append(self)

    def __int__(self):
        return self.memory.ctypes.data

    def free(self):
        self.driver.current()
        self.driver.living.remove(self)


def test_a_stream_on_pycuda_copies_both_ways_and_frees_all_it_made():
    driver = Driver()
    stream = cuda.Stream(PyCuda(driver))
    first, second = (stream.buffer((2, 3), "float16") for _ in range(2))
    first.host[:] = 7
    stream.upload(first)
    stream.copy(first, second)
    stream.download(second)
    stream.wait()
    assert (second.host.tolist(), stream.handle, len(driver.living)) == ([[7] * 3] * 2, 7, 5)
    assert driver.stack == []  # pycuda aborts a process that ends with a context on its stack
    stream.close()
    assert (driver.living, driver.stack) == ([], [])


def test_events_of_pycuda_tell_the_time_between_them_and_are_freed():
    driver = Driver()
    stream = cuda.Stream(PyCuda(driver))
    first, last = stream.event(), stream.event()
    for event in (first, last):
        stream.record(event)
    assert (stream.elapsed_ms(first, last), stream.elapsed_ms(last, first)) == (4, -4)
    assert len(driver.living) == 3
    stream.close()
    assert (driver.living, driver.stack) == ([], [])


def test_pycuda_tells_of_the_gpu():
    library = PyCuda(Driver())
    assert library.device() == cuda.Device("Orin", "8.7", 30 << 10, True, "12.6")
    assert (library.devices(), library.free_memory()) == (1, 5 << 30)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (Driver.MemoryError("cuMemAlloc failed: out of memory"), "free memory"),
        (Driver.LaunchError("cuStreamSynchronize failed: unspecified launch failure"), "start it again"),
    ],
)
def test_an_error_of_pycuda_is_told_in_its_words_and_leaves_no_context_behind(error, hint):
    driver = Driver()
    stream = cuda.Stream(PyCuda(driver))
    driver.fails = error
    with pytest.raises(EnvironmentProblem, match=f"CUDA error: {error}") as caught:
        stream.buffer((1,), "float32")
    assert hint in caught.value.hint
    stream.close()
    assert driver.stack == []


def test_pycuda_has_no_graphs_and_says_what_has():
    with pytest.raises(EnvironmentProblem, match="pycuda has no CUDA graphs") as caught:
        cuda.Stream(PyCuda(Driver())).capture(lambda: None)
    assert caught.value.hint == "pip install cuda-python"


def test_a_sticky_error_asks_for_a_new_process_and_others_do_not():
    def answering(code: int) -> CudaPython:
        names = ("cudaError_t", "cudaGetErrorString")
        answer = {"cudaStreamSynchronize": lambda stream: (real.cudaError_t(code),)}
        return CudaPython(SimpleNamespace(**{name: getattr(real, name) for name in names}, **answer))

    with pytest.raises(EnvironmentProblem, match="CUDA error 700: an illegal memory access") as sticky:
        answering(700).wait(1)
    assert sticky.value.hint == "this error stays until the process ends; start it again"
    with pytest.raises(EnvironmentProblem, match="CUDA error 1: invalid argument") as other:
        answering(1).wait(1)
    assert other.value.hint is None


def test_every_function_that_is_called_is_one_of_the_real_module():
    source = Path(str(sys.modules[CudaPython.__module__].__file__)).read_text(encoding="utf-8")
    called = set(re.findall(r"\bcuda[A-Z]\w+", source))
    assert len(called) > 20
    known = {*dir(real), *real.cudaMemcpyKind.__members__, *real.cudaStreamCaptureMode.__members__, "cudaSuccess"}
    assert called <= known


@without_driver
def test_without_a_driver_the_real_library_gives_the_reason():
    assert cuda.problem() == "no NVIDIA driver is installed"
    for call in (cuda.Stream, cuda.device, cuda.free_memory_mib):
        with pytest.raises(EnvironmentProblem, match=r"CUDA error 35: .*driver version is insufficient"):
            call()


def test_a_driver_that_answers_with_an_error_is_told_as_not_usable(monkeypatch):
    driver = Driver()
    driver.fails = Driver.LogicError("cuInit failed: unknown error")
    monkeypatch.setattr(cuda, "cuda_library", lambda: PyCuda(driver))
    assert cuda.problem() == "no usable NVIDIA driver: CUDA error: cuInit failed: unknown error"


def test_pycuda_is_taken_where_cuda_python_is_not(monkeypatch):
    driver = Driver()
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    assert cuda_library().name == "pycuda"
    assert (cuda.problem(), cuda.device().name, cuda.free_memory_mib()) == (None, "Orin", 5 << 10)


def test_without_either_library_the_reason_says_what_to_install(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match="neither cuda-python nor pycuda is installed") as caught:
        cuda_library()
    assert caught.value.hint == "pip install cuda-python"
    assert cuda.problem() == f"{caught.value.message}"
