"""Build, save, load, run: on every lane the actions of the graph; each planted fault does what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.standins import LANES, alive, calls, environment, installed
from tests.unit.backends.conftest import conv_net, quantized, quantized_net, serialise, weight


class Built:
    """What one build said and gave."""

    def __init__(self, trt: ModuleType, graph: bytes, **wanted: Any) -> None:
        self.trt = trt
        self.log: list[tuple[str, str]] = []
        lines = self.log

        class Log(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, message: str) -> None:
                lines.append((severity.name, message))

        self.logger = Log()
        builder = trt.Builder(self.logger)
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = builder.create_network(strong if wanted.get("strong", True) else 0)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.parsed = self.parser.parse(graph)
        config = builder.create_builder_config()
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, wanted.get("verbosity", "DETAILED"))
        for flag in wanted.get("flags", ()):
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if "profile" in wanted:
            profile = builder.create_optimization_profile()
            profile.set_shape(*wanted["profile"])
            config.add_optimization_profile(profile)
        if "cache" in wanted:
            cache = config.create_timing_cache(wanted["cache"])
            self.cache_taken = config.set_timing_cache(cache, ignore_mismatch=False)
            self.cache = cache
        self.plan = builder.build_serialized_network(self.network, config) if self.parsed else None

    @property
    def errors(self) -> str:
        return "\n".join(message for level, message in self.log if level == "ERROR")

    def load(self) -> Any:
        return self.trt.Runtime(self.logger).deserialize_cuda_engine(self.plan)

    def inspect(self) -> dict[str, Any]:
        told = self.load().create_engine_inspector()
        return json.loads(told.get_engine_information(self.trt.LayerInformationFormat.JSON))


def run(built: Built, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs, through the stand-in's CUDA; everything is freed again."""
    import cuda.bindings.runtime as cuda

    def ok(answer: tuple[Any, ...]) -> Any:
        assert answer[0] == cuda.cudaError_t.cudaSuccess, answer
        return answer[1] if len(answer) > 1 else None

    engine = built.load()
    context = engine.create_execution_context()
    stream = ok(cuda.cudaStreamCreate())
    kinds = cuda.cudaMemcpyKind
    given, buffers = {}, {}
    for name, value in feeds.items():
        assert context.set_input_shape(name, value.shape)
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        shape, dtype = tuple(context.get_tensor_shape(name)), built.trt.nptype(engine.get_tensor_dtype(name))
        given[name] = np.ascontiguousarray(feeds[name]) if name in feeds else np.empty(shape, dtype)
        buffers[name] = ok(cuda.cudaMalloc(given[name].nbytes))
        assert context.set_tensor_address(name, buffers[name])
        if name in feeds:
            size = given[name].nbytes
            ok(cuda.cudaMemcpyAsync(buffers[name], given[name].ctypes.data, size, kinds.cudaMemcpyHostToDevice, stream))
    assert context.execute_async_v3(int(stream)), built.errors
    outputs = {name: value for name, value in given.items() if name not in feeds}
    for name, value in outputs.items():
        ok(cuda.cudaMemcpyAsync(value.ctypes.data, buffers[name], value.nbytes, kinds.cudaMemcpyDeviceToHost, stream))
    ok(cuda.cudaStreamSynchronize(stream))
    for address in buffers.values():
        ok(cuda.cudaFree(address))
    ok(cuda.cudaStreamDestroy(stream))
    assert not any(alive().values())
    return outputs


def by_onnxruntime(graph: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feeds)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape or (1, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("lane", LANES)
def test_an_engine_gives_what_its_graph_gives(lane):
    feeds = {"image": image()}
    with installed(lane) as trt:
        found = run(Built(trt, conv_net()), feeds)["features"]
    np.testing.assert_allclose(found, by_onnxruntime(conv_net(), feeds)[0], rtol=1e-5, atol=1e-6)


def test_plans_of_one_graph_differ_and_load_in_another_process(tmp_path):
    with installed("10.3") as trt:
        first, second = Built(trt, conv_net()), Built(trt, conv_net())
        assert bytes(first.plan) != bytes(second.plan)
        assert first.plan.nbytes == len(bytes(first.plan))
        (tmp_path / "engine.plan").write_bytes(first.plan)
    code = (
        "import sys, tensorrt as trt; data = open(sys.argv[1], 'rb').read();"
        "engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(data); print(engine.num_io_tensors)"
        "; assert not {'onnx', 'torch'} & set(sys.modules)"
    )
    done = child(["-c", code, str(tmp_path / "engine.plan")], "10.3")
    assert done.stdout.strip() == "2", done.stderr


def child(arguments: list[str], lane: str, **wanted: Any) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment(lane, **wanted)}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=60)


def test_a_dynamic_dimension_wants_a_profile_and_is_held_to_it():
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    graph = serialise(nodes, {"x": ["rows", 4]}, {"y": ["rows", 4]}, {})
    with installed("10.13") as trt:
        without = Built(trt, graph)
        assert without.plan is None
        assert "no optimization profile has been defined" in without.errors
        built = Built(trt, graph, profile=("x", (1, 4), (2, 4), (8, 4)))
        assert run(built, {"x": image(8, 4)})["y"].shape == (8, 4)
        context = built.load().create_execution_context()
        assert tuple(context.get_tensor_shape("x")) == (-1, 4)
        assert not context.set_input_shape("x", (9, 4))
        assert "does not satisfy any optimization profiles" in built.errors


@pytest.mark.parametrize("lane", LANES)
def test_a_refused_node_is_named_with_its_operator(lane):
    with installed(lane) as trt:
        nodes = [
            helper.make_node("Relu", ["x"], ["r"], name="first"),
            helper.make_node("Det", ["r"], ["y"], name="my/det"),
        ]
        built = Built(trt, serialise(nodes, {"x": [4, 4]}, {"y": []}, {}))
        assert not built.parsed
        error = built.parser.get_error(0)
        assert (error.node(), error.node_name(), error.node_operator()) == (1, "my/det", "Det")
        assert error.code() == trt.ErrorCode.UNSUPPORTED_NODE
        assert "While parsing node number 1 [Det" in built.errors


def test_a_foreign_operator_an_offset_and_an_int32_bias_are_refused():
    with installed("11.4") as trt:
        foreign = [helper.make_node("Wave", ["x"], ["y"], name="wave", domain="maker.example")]
        assert "Plugin not found" in Built(trt, serialise(foreign, {"x": [4]}, {"y": [4]}, {})).errors
        nodes = [*quantized("x", "zero")]
        graph = serialise(nodes, {"x": [4]}, {"x_dq": [4]}, {"x_s": np.float32(0.1), "zero": np.int8(3)})
        assert "Non-zero zero point is not supported" in Built(trt, graph).errors
        assert Built(trt, quantized_net()).parsed
        bias = [helper.make_node("DequantizeLinear", ["b", "s", "zero"], ["y"], name="bias/dq")]
        graph = serialise(
            bias, {"x": [4]}, {"y": [4]}, {"b": np.zeros(4, np.int32), "s": np.float32(1), "zero": np.int32(0)}
        )
        assert "bias/dq: input has type Int32 but must have type" in Built(trt, graph).errors


def mixed_types() -> bytes:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="product"),
    ]
    return serialise(nodes, {"x": [4, 4]}, {"y": [4, 4]}, {"w": weight(4, 4, seed=1)})


def test_strongly_typed_networks_refuse_mixed_types_and_precision_flags():
    with installed("10.3") as trt:
        mixed = Built(trt, mixed_types())
        assert not mixed.parsed
        assert "product: IMatrixMultiplyLayer must have same input types" in mixed.errors
        assert Built(trt, mixed_types(), strong=False).parsed
        flagged = Built(trt, quantized_net(), flags=["INT8"])
        assert flagged.plan is None
        assert "Strongly typed networks do not take the precision flag kINT8" in flagged.errors


def test_weakly_typed_quantized_networks_want_their_flag():
    with installed("10.3") as trt:
        assert "int8 is not configured" in Built(trt, quantized_net(), strong=False).errors
        assert Built(trt, quantized_net(), strong=False, flags=["INT8"]).plan is not None


def test_bf16_runs_although_a_cpu_lacks_it():
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], name="cast", to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["b", "three"], ["m"], name="mul"),
        helper.make_node("Mul", ["m", "half"], ["n"], name="again"),
        helper.make_node("Cast", ["n"], ["y"], name="back", to=TensorProto.FLOAT),
    ]
    weights = {
        "three": helper.make_tensor("three", TensorProto.BFLOAT16, [1], [3.0]),
        "half": helper.make_tensor("half", TensorProto.BFLOAT16, [1], b"\x00\x3f", raw=True),
    }
    graph = serialise(nodes, {"x": [4]}, {"y": [4]}, weights)
    feeds = {"x": np.asarray([1, -2, 0.5, 100], np.float32)}
    with installed("10.3") as trt:
        np.testing.assert_array_equal(run(Built(trt, graph), feeds)["y"], 1.5 * feeds["x"])


@pytest.mark.parametrize(("sm", "built"), [("8.7", False), ("8.9", True), ("11.0", True)])
def test_fp8_wants_a_gpu_that_has_it(sm, built):
    with installed("10.13", sm=sm) as trt:
        eight = Built(trt, quantized_net(TensorProto.FLOAT8E4M3FN))
    assert (eight.plan is not None) == built
    assert built or "require hardware with FP8 support" in eight.errors


FAULTS: dict[str, Callable[[Built], bool]] = {
    "build-none": lambda built: built.plan is None and "Could not find any implementation" in built.errors,
    "strong-refused": lambda built: built.plan is None and "Could not find any implementation" in built.errors,
    "deserialize-none": lambda built: built.load() is None and "Error Code 1: Serialization" in built.errors,
    "out-of-memory": lambda built: built.plan is None and "out of memory" in built.errors,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_none_and_its_reason_only_in_the_log(fault):
    with installed("10.3", faults=[fault]) as trt:
        assert FAULTS[fault](Built(trt, conv_net()))


def test_only_10_3_refuses_what_is_strongly_typed():
    for lane in LANES[1:]:
        with installed(lane, faults=["strong-refused"]) as trt:
            assert Built(trt, conv_net()).plan is not None
    with installed("10.3", faults=["strong-refused"]) as trt:
        assert Built(trt, conv_net(), strong=False).plan is not None


def test_wrong_actions_are_wrong():
    feeds = {"image": image()}
    with installed("10.3", faults=["wrong-actions"]) as trt:
        found = run(Built(trt, conv_net()), feeds)["features"]
    assert np.abs(found - by_onnxruntime(conv_net(), feeds)[0]).min() > 0.9


def test_a_context_that_fails_says_why():
    with installed("11.4", faults=["execute-fails"]) as trt:
        built = Built(trt, conv_net())
        context = built.load().create_execution_context()
        assert not context.execute_async_v3(0)
        assert "enqueueV3" in built.errors


def test_running_without_an_address_fails():
    with installed("11.4") as trt:
        built = Built(trt, conv_net())
        assert not built.load().create_execution_context().execute_async_v3(0)
        assert "Address is not set for image" in built.errors


KILLED = {
    "builder-killed": signal.SIGKILL,
    "builder-segfaults": signal.SIGSEGV,
    "parser-crashes": signal.SIGSEGV,
    "deserialize-segfaults": signal.SIGSEGV,
    "execute-segfaults": signal.SIGSEGV,
}


@pytest.mark.parametrize("fault", KILLED)
def test_a_fault_that_kills_kills_its_process(fault, tmp_path):
    (tmp_path / "model.onnx").write_bytes(conv_net())
    code = (
        "import sys, tensorrt as trt; log = trt.Logger(); builder = trt.Builder(log);"
        "network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED));"
        "parser = trt.OnnxParser(network, log); parser.parse_from_file(sys.argv[1]);"
        "plan = builder.build_serialized_network(network, builder.create_builder_config());"
        "engine = trt.Runtime(log).deserialize_cuda_engine(plan);"
        "engine.create_execution_context().execute_async_v3(0)"
    )
    assert child(["-c", code, str(tmp_path / "model.onnx")], "10.3", faults=[fault]).returncode == -KILLED[fault]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"lane": "10.13"}, "Version tag does not match"),
        ({"sm": "11.0"}, "incompatible device, expecting compute 11.0 got compute 8.7"),
        ({"gpu": "NVIDIA Orin Nano"}, "different models of devices"),
        ({"os": "win32-AMD64"}, "Platform specific tag mismatch"),
    ],
)
def test_a_plan_of_another_machine_does_not_load(other, message):
    with installed("10.3") as trt:
        plan = bytes(Built(trt, conv_net()).plan)
    wanted = {"lane": "10.3", **other}
    with installed(wanted.pop("lane"), **wanted) as trt:
        built = Built(trt, conv_net())
        assert trt.Runtime(built.logger).deserialize_cuda_engine(plan) is None
        assert message in built.errors


def test_compatible_plans_load_where_others_do_not():
    with installed("10.3", sm="8.6") as trt:
        builder = trt.Builder(trt.Logger())
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, trt.Logger())
        assert parser.parse(conv_net())
        config = builder.create_builder_config()
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        plan = bytes(builder.build_serialized_network(network, config))
    with installed("10.13", sm="8.9", gpu="NVIDIA RTX 4090") as trt:
        runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
        assert runtime.deserialize_cuda_engine(plan) is None
        runtime.engine_host_code_allowed = True
        assert runtime.deserialize_cuda_engine(plan).num_io_tensors == 2
    with installed("11.4", sm="8.9") as trt:
        runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
        runtime.engine_host_code_allowed = True
        assert runtime.deserialize_cuda_engine(plan) is None


def test_rubbish_is_no_plan():
    with installed("11.4") as trt:
        built = Built(trt, conv_net())
        for data in (b"", b"rubbish", bytes(built.plan)[:-1]):
            assert trt.Runtime(built.logger).deserialize_cuda_engine(data) is None
        assert "Magic tag does not match" in built.errors


def test_a_timing_cache_is_reused_here_and_refused_elsewhere(tmp_path):
    log = tmp_path / "calls"
    with installed("10.3", log=log) as trt:
        first = Built(trt, conv_net(), cache=b"")
        data = bytes(first.cache.serialize())
        assert Built(trt, conv_net(), cache=data).cache_taken
        empty = Built(trt, conv_net(), cache=b"damaged")
        assert ("WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.") in empty.log
        kernels = len(json.loads(data.split(b"\n", 1)[1])["keys"])
    timed = [line for line in calls(log) if line.startswith("timed")]
    assert timed == [f"timed({kernels}, 0)", f"timed(0, {kernels})", f"timed({kernels}, 0)"]
    with installed("10.3", gpu="NVIDIA Orin Nano") as trt:
        elsewhere = Built(trt, conv_net(), cache=data)
        assert not elsewhere.cache_taken
        assert "timing cache is of another device" in elsewhere.errors
    with installed("10.13") as trt:
        later = Built(trt, conv_net(), cache=data)
        assert later.cache_taken
        assert ("WARNING", "The timing cache will not be used!") in later.log


def test_the_progress_monitor_sees_nested_phases_and_can_cancel():
    seen: list[str] = []
    with installed("10.16") as trt:

        class Monitor(trt.IProgressMonitor):
            def __init__(self, go_on: bool) -> None:
                super().__init__()
                self.go_on = go_on
                self.open: list[str] = []

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                assert parent_phase == (self.open[-1] if self.open else None)
                self.open.append(phase_name)
                seen.append(phase_name)

            def step_complete(self, phase_name: str, step: int) -> bool:
                assert phase_name == self.open[-1]
                return self.go_on

            def phase_finish(self, phase_name: str) -> None:
                assert phase_name == self.open.pop()

        built = Built(trt, conv_net())
        config = trt.Builder(built.logger).create_builder_config()
        config.progress_monitor = monitor = Monitor(True)
        builder = built.network.builder
        assert builder.build_serialized_network(built.network, config) is not None
        assert seen[0] == "Building engine"
        assert monitor.open == []
        config.progress_monitor = Monitor(False)
        assert builder.build_serialized_network(built.network, config) is None
        assert "Build was cancelled" in built.errors


def test_a_parser_must_outlive_the_build():
    with installed("11.4") as trt:
        built = Built(trt, conv_net())
        del built.parser
        builder = built.network.builder
        with pytest.raises(RuntimeError, match="the parser is gone"):
            builder.build_serialized_network(built.network, builder.create_builder_config())


def test_no_driver_means_no_builder():
    with installed("11.4", faults=["no-driver"]) as trt:
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
        assert trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(b"x") is None


def test_a_library_that_cannot_be_imported_says_what_is_missing():
    with pytest.raises(ImportError, match=r"libnvinfer\.so\.10"), installed("10.3", faults=["no-tensorrt"]):
        pass
