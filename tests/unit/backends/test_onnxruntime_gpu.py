"""ONNX Runtime on GPUs, as far as a machine without one can tell: nothing ends on the CPU unsaid."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions
from vlaopt.backends.onnxruntime import FILE, PROVIDER, driver, gpu, inference_session, plain_options
from vlaopt.backends.onnxruntime.kernels import Kernel
from vlaopt.errors import EnvironmentProblem, InputError, StageError

NAMES = ["onnxruntime-cuda", "onnxruntime-tensorrt"]
ON_CUDA = Kernel("head/fc", "Gemm", gpu.CUDA, ("float16", "float16"))
ON_TENSORRT = Kernel("TRTKernel_graph_0", "TRTKernel_graph_0", gpu.TENSORRT, ("float",))
ON_CPU = Kernel("pool", "GlobalAveragePool", PROVIDER, ("float",))


def on_cpu(graph: bytes, backend: str = "onnxruntime-cuda") -> gpu.DeviceSession:
    """What runs on a GPU, on the CPU: binding is the same."""
    return gpu.DeviceSession(inference_session(Graph(graph), plain_options(1)), backend, "cpu")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend that finds a GPU, and says that these kernels ran on it."""

    def make(name: str, *kernels: Kernel) -> backends.Backend:
        monkeypatch.setattr(gpu.GpuBackend, "runnable", lambda self: None)
        monkeypatch.setattr(gpu.GpuBackend, "_profile", lambda self, graph, options: list(kernels))
        return backends.get(name)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_build_for_the_cpu_alone_is_told_with_what_to_install(name: str) -> None:
    backend = backends.get(name)
    if backend.missing() is None:
        pytest.skip("onnxruntime-gpu is installed")
    assert re.fullmatch(
        r"this onnxruntime has no \w+ExecutionProvider: pip install 'vlaopt\[gpu\]'", str(backend.missing())
    )
    assert backend.runnable() == backend.missing()
    with pytest.raises(EnvironmentProblem, match=f"{name} cannot build here: this onnxruntime has no"):
        backend.build(Graph(b""), EngineOptions())
    with pytest.raises(EnvironmentProblem, match=f"a {name} engine cannot run here: this onnxruntime has no"):
        backend.open({FILE: b""}, EngineOptions())


def test_without_a_driver_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in gpu._LIBRARIES.values():
        (tmp_path / library).touch()
    monkeypatch.setattr(gpu, "_libraries", lambda: tmp_path)
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
    backend = backends.get("onnxruntime-cuda")
    assert backend.missing() is None
    assert backend.runnable() == "no NVIDIA driver: libcuda-of-nobody.so.1 cannot be loaded"
    assert backend.machine() == {}


def test_the_driver_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(value: int) -> Any:
        return lambda place, *arguments: setattr(place._obj, "value", value) or 0

    def name(place: Any, longest: int, index: Any) -> int:
        place.value = b"NVIDIA L4"
        return 0

    library = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGetCount=put(1),
        cuDeviceGet=put(0),
        cuDeviceGetName=name,
        cuDeviceGetAttribute=lambda place, attribute, index: put({75: 8, 76: 9}[attribute])(place),
    )
    monkeypatch.setattr("ctypes.CDLL", lambda path: library)
    assert gpu.CUDA_BACKEND.machine() == {"gpu": "NVIDIA L4", "sm": "8.9"}
    library.cuDeviceGetCount = put(0)
    assert driver.problem() == "the NVIDIA driver sees no GPU"
    library.cuInit = lambda flags: 100
    assert driver.problem() == "no usable NVIDIA driver: it answers error 100"


def test_onnx_runtimes_own_fallback_to_the_cpu_is_an_error(
    graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backends.get("onnxruntime-cuda").missing() is None:
        pytest.skip("onnxruntime-gpu is installed")
    monkeypatch.setattr(gpu.GpuBackend, "runnable", lambda self: None)
    with pytest.raises(
        EnvironmentProblem, match=r"CUDAExecutionProvider cannot be used: this onnxruntime has .*CPUExecutionProvider"
    ) as caught:
        backends.get("onnxruntime-cuda").open({FILE: graphs["conv"]}, EngineOptions())
    assert "fallback to CPU EP has been explicitly disabled" in str(caught.value.__cause__)
    assert "vlaopt[gpu]" in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_took_the_cpu_in_silence_is_an_error(graphs: dict[str, bytes]) -> None:
    if backends.get("onnxruntime-cuda").missing() is None:
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(EnvironmentProblem, match="chose CPUExecutionProvider instead of CUDAExecutionProvider"):
        inference_session(Graph(graphs["conv"]), plain_options(1), [(gpu.CUDA, {})])


def test_a_provider_whose_libraries_are_not_here_is_told_with_the_loaders_reason(
    graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As onnxruntime-gpu without CUDA: it names the provider, logs why it does not load and goes on with the CPU."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [gpu.CUDA, PROVIDER])
    monkeypatch.setattr(gpu, "_libraries", lambda: tmp_path)
    monkeypatch.setattr(gpu.GpuBackend, "runnable", lambda self: None)
    with pytest.raises(
        EnvironmentProblem, match=r"CUDAExecutionProvider cannot be used: .*cannot open shared"
    ) as caught:
        backends.get("onnxruntime-cuda").open({FILE: graphs["conv"]}, EngineOptions())
    assert "onnxruntime-gpu[cuda,cudnn]" in str(caught.value.hint)


def test_a_kernel_on_the_cpu_fails_the_build_by_name(runs: Any, graphs: dict[str, bytes]) -> None:
    with pytest.raises(StageError, match=r"would run 1 of 2 kernels on CPUExecutionProvider: pool \(GlobalAverage"):
        runs("onnxruntime-cuda", ON_CUDA, ON_CPU).build(Graph(graphs["conv"]), EngineOptions())


def test_what_ran_is_read_from_a_profiled_run(monkeypatch: pytest.MonkeyPatch, graphs: dict[str, bytes]) -> None:
    """On the CPU, as if a provider had left it everything."""
    monkeypatch.setattr(gpu.GpuBackend, "runnable", lambda self: None)
    monkeypatch.setattr(
        gpu.GpuBackend, "_session", lambda self, graph, chosen, options: inference_session(graph, chosen)
    )
    told = r"onnxruntime-cuda would run (\d+) of \1 kernels on CPUExecutionProvider: .*\(\w*Conv\)"
    with pytest.raises(StageError, match=told):
        backends.get("onnxruntime-cuda").build(Graph(graphs["conv"]), EngineOptions(threads=1))


def test_an_engine_says_which_provider_ran_what(runs: Any, graphs: dict[str, bytes]) -> None:
    engine = runs("onnxruntime-tensorrt", ON_TENSORRT, ON_CUDA).build(Graph(graphs["conv"]), EngineOptions())
    assert engine.facts["providers"] == {gpu.CUDA: 1, gpu.TENSORRT: 1}
    assert engine.files == {FILE: graphs["conv"]}
    assert engine.layers == {"head/fc": "fp16"}
    assert engine.precisions == {"fp16": 1}


def test_tensorrt_that_takes_nothing_is_no_engine(runs: Any, graphs: dict[str, bytes]) -> None:
    with pytest.raises(StageError, match="TensorrtExecutionProvider takes no node of the graph"):
        runs("onnxruntime-tensorrt", ON_CUDA).build(Graph(graphs["conv"]), EngineOptions())


def test_tensorrt_is_told_nothing_of_precision_and_keeps_plans_by_graph(tmp_path: Path) -> None:
    backend = gpu.TENSORRT_BACKEND
    options = EngineOptions(cache=tmp_path, settings={"optimization_level": 5, "workspace_mib": 64})
    told = backend._provider_options(gpu.TENSORRT, Graph(b"a"), options)
    assert not {name for name in told if "fp16" in name or "int8" in name or "bf16" in name or "force" in name}
    assert told["trt_builder_optimization_level"] == 5
    assert told["trt_max_workspace_size"] == 64 << 20
    assert Path(told["trt_engine_cache_path"]).parent == Path(told["trt_timing_cache_path"])
    other = backend._provider_options(gpu.TENSORRT, Graph(b"b"), options)
    assert other["trt_engine_cache_path"] != told["trt_engine_cache_path"]
    quick = replace(options, settings={**options.settings, "optimization_level": 0})
    sooner = backend._provider_options(gpu.TENSORRT, Graph(b"a"), quick)
    assert sooner["trt_engine_cache_path"] != told["trt_engine_cache_path"]
    (tmp_path / "file").touch()
    elsewhere = replace(options, cache=tmp_path / "file")
    assert "trt_engine_cache_enable" not in backend._provider_options(gpu.TENSORRT, Graph(b"a"), elsewhere)
    assert "trt_engine_cache_enable" not in backend._provider_options(gpu.TENSORRT, Graph(b"a"), EngineOptions())
    assert backend._provider_options(gpu.CUDA, Graph(b"a"), options)["cudnn_conv_use_max_workspace"] == "0"
    assert backend._provider_options(gpu.CUDA, Graph(b"a"), EngineOptions())["cudnn_conv_use_max_workspace"] == "1"


@pytest.mark.parametrize(("name", "value"), [("optimization_level", "high"), ("workspace_mib", -1)])
def test_a_setting_of_the_wrong_kind_is_refused(name: str, value: Any, graphs: dict[str, bytes]) -> None:
    with pytest.raises(InputError, match=f"setting '{name}' is a number from 0 on"):
        backends.get("onnxruntime-tensorrt").build(Graph(graphs["conv"]), EngineOptions(settings={name: value}))


def test_a_bound_that_cudnn_cannot_keep_is_refused(graphs: dict[str, bytes]) -> None:
    with pytest.raises(InputError, match="onnxruntime-cuda cannot keep to 31 MiB, only to 32"):
        backends.get("onnxruntime-cuda").build(Graph(graphs["conv"]), EngineOptions(settings={"workspace_mib": 31}))


def test_a_session_on_a_device_agrees_with_the_cpu(graphs: dict[str, bytes]) -> None:
    cpu = backends.get("onnxruntime")
    expected = cpu.open({FILE: graphs["conv"]}, EngineOptions(threads=1))
    session = on_cpu(graphs["conv"])
    assert (session.inputs, session.outputs) == (expected.inputs, expected.outputs)
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    first = session.run({"image": image})["features"]
    kept = first.copy()
    np.testing.assert_allclose(first, expected.run({"image": image})["features"], atol=1e-5)
    session.run({"image": image * 2})
    assert np.array_equal(first, kept)


def test_a_resident_goes_from_session_to_session_and_an_array_after_it(one_node: Any) -> None:
    first, second = on_cpu(one_node("Neg", x="x", y="y")), on_cpu(one_node("Abs", x="y", y="z"))
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8)
    resident = first.run({"x": x}, resident={"y"})["y"]
    assert (resident.backend, resident.dtype, resident.shape) == ("onnxruntime-cuda", "float32", (1, 8))
    for _ in range(2):
        np.testing.assert_array_equal(second.run({"y": resident})["z"], np.abs(x))
    np.testing.assert_array_equal(second.run({"y": 2 * x})["z"], np.abs(2 * x))
    np.testing.assert_array_equal(second.run({"y": resident})["z"], np.abs(x))


def test_a_resident_of_another_backend_is_refused(one_node: Any) -> None:
    first, second = on_cpu(one_node("Neg"), "onnxruntime-tensorrt"), on_cpu(one_node("Abs", x="y", y="z"))
    resident = first.run({"x": np.ones((1, 8), np.float32)}, resident={"y"})["y"]
    with pytest.raises(InputError, match="stays in the memory of onnxruntime-tensorrt"):
        second.run({"y": resident})
