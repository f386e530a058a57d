"""On a GPU: both CUDA libraries move and capture memory, and a policy runs on TensorRT as one CUDA graph."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from tests.unit.backends.tensorrt.test_running import EULER, FACTOR, NOISE, by_hand, flow_spec, prefix, step
from vlaopt import backends
from vlaopt.backends import EngineOptions, Session
from vlaopt.backends.tensorrt.cuda import Stream, problem
from vlaopt.backends.tensorrt.cuda_libraries import CudaPython, Library, PyCuda
from vlaopt.errors import EnvironmentProblem
from vlaopt.runtime.loop import run_loop

LIBRARIES: dict[str, Callable[[Any], Library]] = {"cuda.bindings.runtime": CudaPython, "pycuda.driver": PyCuda}
CLASSIC, RTX = backends.get("tensorrt"), backends.get("tensorrt-rtx")

pytestmark = pytest.mark.gpu
on_a_gpu = pytest.mark.skipif(problem() is not None, reason=str(problem()))


def on(backend: backends.Backend) -> pytest.MarkDecorator:
    reason = backend.missing() or backend.runnable()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@on_a_gpu
@pytest.mark.parametrize("module", LIBRARIES)
def test_memory_goes_to_the_device_across_it_and_back(module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)
    stream = Stream(LIBRARIES[module](importlib.import_module(module)))
    first, second = (stream.buffer((3, 5), "float16") for _ in range(2))
    for value in (1, 2):
        first.host[:] = value
        stream.upload(first)
        stream.copy(first, second)
        stream.download(second)
        stream.wait()
        assert (second.host == value).all()
    assert stream.library.device().sm[0].isdecimal()
    assert stream.library.free_memory() > 0
    stream.close()


@on_a_gpu
def test_what_is_captured_runs_when_it_is_launched_and_a_spoilt_capture_is_told() -> None:
    pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    stream = Stream()
    first, second = (stream.buffer((4,), "float32") for _ in range(2))
    captured = stream.capture(lambda: stream.copy(first, second))
    for value in (1, 2):
        first.host[:] = value
        stream.upload(first)
        captured.launch()
        stream.download(second)
        stream.wait()
        assert second.host.tolist() == [value] * 4
    with pytest.raises(EnvironmentProblem, match="CUDA error 9"):  # 900 to 906: what a capture does not allow
        stream.capture(stream.wait)
    stream.upload(first)
    stream.wait()
    stream.close()


@on_a_gpu
@pytest.mark.parametrize("module", LIBRARIES)
def test_events_tell_what_copies_take(module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)
    stream = Stream(LIBRARIES[module](importlib.import_module(module)))
    large, events = stream.buffer((1 << 24,), "float32"), [stream.event() for _ in range(3)]
    for event in events[:2]:
        stream.record(event)
        stream.upload(large)
    stream.record(events[2])
    stream.wait()
    # 64 MiB each: no bus carries more than a few hundred GB a second.
    assert min(stream.elapsed_ms(*events[:2]), stream.elapsed_ms(*events[1:])) > 0.05
    assert stream.elapsed_ms(events[0], events[2]) == pytest.approx(
        stream.elapsed_ms(*events[:2]) + stream.elapsed_ms(*events[1:]), abs=0.01
    )
    stream.close()


def opened(backend: backends.Backend, kind: int = TensorProto.FLOAT) -> dict[str, Session]:
    options = EngineOptions()
    graphs = {"eye": prefix(), "flow": step(kind)}
    return {name: backend.open(backend.build(graph, options).files, options) for name, graph in graphs.items()}


@on(CLASSIC)
def test_a_policy_is_one_cuda_graph_on_classic_tensorrt() -> None:
    sessions = opened(CLASSIC)
    for _ in range(3):
        result = run_loop(flow_spec(), sessions, {"state": np.sqrt(FACTOR)}, NOISE)
        assert result["x"] == pytest.approx(by_hand(FACTOR), abs=1e-3)
    assert backends.told(sessions["eye"]) == (f"in one CUDA graph: eye, flow × {len(EULER.times)}",)


@on(RTX)
def test_a_policy_runs_step_by_step_on_tensorrt_for_rtx() -> None:
    result = run_loop(flow_spec(), opened(RTX), {"state": np.sqrt(FACTOR)}, NOISE)
    assert result["x"] == pytest.approx(by_hand(FACTOR), abs=1e-3)


@pytest.mark.parametrize("backend", [pytest.param(CLASSIC, marks=on(CLASSIC)), pytest.param(RTX, marks=on(RTX))])
def test_the_device_times_a_run_within_what_the_host_waits_for_it(backend: backends.Backend) -> None:
    session = opened(backend)["flow"]
    feeds = {"x": NOISE, "t": np.ones(1, np.float32), "prefix": FACTOR}
    assert isinstance(session, backends.Timing)
    for _ in range(3):
        session.run(feeds)
    with session.device_times() as times:
        started = time.perf_counter()
        result = session.run(feeds)["v"]
        waited_ms = (time.perf_counter() - started) * 1e3
    assert result == pytest.approx(NOISE * FACTOR + 1, abs=1e-3)
    [taken] = times
    assert taken.compute_ms > 0 < taken.copies_ms
    assert taken.compute_ms + taken.copies_ms < waited_ms
