"""The running half of the library: plans are loaded, inspected, and run by ONNX Runtime on the device's host memory."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from standin import layers
from standin.definition import data_type
from standin.device import DEVICE, ILLEGAL_ADDRESS, CudaError
from standin.logger import say
from standin.natives import host_memory
from standin.plan import Plan, mismatch, unpack
from standin.widen import to_bfloat16, to_float32, widened

NUMPY = {
    "FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "bool", "DOUBLE": "float64",
}  # fmt: skip


class Runtime:
    """Loads plans that were made by this lane, for this GPU and system."""

    logger = property(lambda self: self._logger)
    max_threads = property(lambda self: 1, lambda self, value: None)
    engine_host_code_allowed = property(
        lambda self: self._host_code, lambda self, value: self.__dict__.update(_host_code=bool(value))
    )

    def __init__(self, logger: Any) -> None:
        self.__dict__.update(_logger=logger, _host_code=False)
        now = self._surface.settings
        if now.has("no-driver") or now.has("no-gpu"):
            code = 35 if now.has("no-driver") else 100
            say(logger, "WARNING", f"CUDA initialization failure with error: {code}")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        surface, logger = self._surface, self._logger
        now = surface.settings
        try:
            data = bytes(serialized_engine)
        except TypeError:
            raise NotImplementedError("stand-in: stream readers are not written") from None
        if now.has("deserialize-segfaults"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if now.has("no-driver") or now.has("no-gpu"):
            say(logger, "ERROR", "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (no CUDA driver)")
            return None
        if now.has("deserialize-none"):
            say(logger, "ERROR", "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (stand-in: planted)")
            return None
        try:
            plan = unpack(data)
        except ValueError as error:
            say(logger, "ERROR", f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({error})")
            return None
        if problem := mismatch(plan.header, surface.version, now, self._host_code):
            say(logger, "ERROR", problem)
            return None
        say(logger, "INFO", f"Loaded engine size: {len(data) >> 20} MiB")
        return surface.names["ICudaEngine"].make(_plan=plan, _logger=logger, _bytes=data, _runner=Runner(plan))


class Runner:
    """ONNX Runtime's session of a plan, made when it is first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._session: Any = None

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self._session is None:
            self._session = self._open()
        given: list[np.ndarray] = self._session.run(None, feeds)
        return given

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        model = widened(self.plan.model) if self.plan.header["bf16"] else self.plan.model
        if not self.plan.data:
            return onnxruntime.InferenceSession(model, options, providers=providers)
        with tempfile.TemporaryDirectory(prefix="standin-") as folder:
            (Path(folder) / self.plan.data_name).write_bytes(self.plan.data)
            (Path(folder) / "model.onnx").write_bytes(model)
            return onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options, providers=providers)


class ICudaEngine:
    num_io_tensors = property(lambda self: len(self._plan.header["inputs"]) + len(self._plan.header["outputs"]))
    num_layers = property(lambda self: len(self._plan.header["layers"]))
    num_optimization_profiles = property(lambda self: max(1, len(self._plan.header["profiles"])))
    name = property(lambda self: self._plan.header["name"])
    device_memory_size = property(lambda self: self._plan.header["activation_bytes"])
    device_memory_size_v2 = property(lambda self: self._plan.header["activation_bytes"])
    streamable_weights_size = property(lambda self: 0)
    num_aux_streams = property(lambda self: 0)
    refittable = property(lambda self: "REFIT" in self._plan.header["flags"])
    has_implicit_batch_dimension = property(lambda self: False)
    engine_capability = property(lambda self: self._surface.names["EngineCapability"].STANDARD)
    tactic_sources = property(lambda self: 24)
    profiling_verbosity = property(
        lambda self: getattr(self._surface.names["ProfilingVerbosity"], self._plan.header["verbosity"])
    )
    hardware_compatibility_level = property(
        lambda self: getattr(
            self._surface.names["HardwareCompatibilityLevel"], self._plan.header["hardware_compatibility_level"]
        )
    )

    def _entries(self) -> list[tuple[str, str, list[Any], str]]:
        header = self._plan.header
        return [(*entry, mode) for mode in ("INPUT", "OUTPUT") for entry in header[f"{mode.lower()}s"]]

    def _entry(self, name: str) -> tuple[str, str, list[Any], str] | None:
        return next((entry for entry in self._entries() if entry[0] == name), None)

    def get_tensor_name(self, index: int) -> str:
        return self._entries()[index][0]

    def get_tensor_mode(self, name: str) -> Any:
        modes, entry = self._surface.names["TensorIOMode"], self._entry(name)
        return modes.NONE if entry is None else getattr(modes, entry[3])

    def get_tensor_dtype(self, name: str) -> Any:
        entry = self._entry(name)
        return data_type(self._surface, "FLOAT" if entry is None else entry[1])

    def get_tensor_shape(self, name: str) -> Any:
        entry = self._entry(name)
        shape = [] if entry is None else [size if isinstance(size, int) else -1 for size in entry[2]]
        return self._surface.names["Dims"](shape)

    def get_tensor_location(self, name: str) -> Any:
        return self._surface.names["TensorLocation"].DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        return self._surface.names["TensorFormat"].LINEAR

    def get_tensor_format_desc(self, name: str, profile_index: int = 0) -> str:
        return "Row major linear FP32 format (kLINEAR)"

    def get_tensor_vectorized_dim(self, name: str, profile_index: int = 0) -> int:
        return -1

    def get_tensor_bytes_per_component(self, name: str, profile_index: int = 0) -> int:
        entry = self._entry(name)
        return -1 if entry is None else _itemsize(entry[1])

    def get_tensor_components_per_element(self, name: str, profile_index: int = 0) -> int:
        return 1

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        shapes = self._plan.header["profiles"]
        entry = self._entry(name)
        found = shapes[profile_index].get(name) if shapes else None
        if found is None:
            found = [] if entry is None else [entry[2]] * 3
        return [self._surface.names["Dims"](shape) for shape in found]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def is_debug_tensor(self, name: str) -> bool:
        return False

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return int(self._plan.header["activation_bytes"])

    get_device_memory_size_for_profile_v2 = get_device_memory_size_for_profile

    def get_engine_stat(self, stat: Any) -> int:
        return int(self._plan.header["weights_bytes"]) if stat.name == "TOTAL_WEIGHTS_SIZE" else 0

    def serialize(self) -> Any:
        return host_memory(self._surface, self._bytes)

    def create_engine_inspector(self) -> Any:
        return self._surface.names["EngineInspector"].make(_engine=self, _context=None)

    def create_runtime_config(self) -> Any:
        return self._surface.names["IRuntimeConfig"].make(_strategy=None)

    def create_execution_context(self, strategy: Any = None) -> Any:
        now = self._surface.settings
        size = self._plan.header["activation_bytes"]
        if now.has("out-of-memory") or size > DEVICE.free_bytes:
            say(
                self._logger, "ERROR",
                "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory); Requested size was "
                f"{size} bytes.",
            )  # fmt: skip
            return None
        shapes = {name: None if _dynamic(shape) else list(shape) for name, _, shape, _ in ICudaEngine._entries(self)}
        return self._surface.names["IExecutionContext"].make(
            _engine=self, _logger=self._logger, _shapes=shapes, _addresses={}, _profile=0, _name="", _warm=False,
            _profiler=None, _emits=True,
        )  # fmt: skip


class IRuntimeConfig:
    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.__dict__["_strategy"] = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy or self._surface.names["ExecutionContextAllocationStrategy"].STATIC


class IExecutionContext:
    engine = property(lambda self: self._engine)
    name = property(lambda self: self._name, lambda self, value: self.__dict__.update(_name=str(value)))
    active_optimization_profile = property(lambda self: self._profile)
    all_binding_shapes_specified = property(lambda self: not self.infer_shapes())
    profiler = property(lambda self: self._profiler, lambda self, value: self.__dict__.update(_profiler=value))

    def set_input_shape(self, name: str, shape: Any) -> bool:
        entry = self._engine._entry(name)
        sizes = [int(size) for size in shape]
        if entry is None or entry[3] != "INPUT" or len(sizes) != len(entry[2]):
            return self._error(f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (tensor {name!r})")
        profile = self._engine.get_tensor_profile_shape(name, self._profile)
        lowest, highest = (profile[0], profile[2]) if profile else (sizes, sizes)
        for size, fixed, low, high in zip(sizes, entry[2], lowest, highest, strict=True):
            if size != fixed if isinstance(fixed, int) else not low <= size <= high:
                return self._error(
                    f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (Parameter check failed, shape "
                    f"{tuple(sizes)} of {name!r} does not satisfy any optimization profiles)"
                )
        if self._shapes[name] != sizes:
            self.__dict__["_warm"] = False
        self._shapes[name] = sizes
        return True

    def get_tensor_shape(self, name: str) -> Any:
        shape = self._resolved().get(name, [])
        return self._surface.names["Dims"]([-1 if size is None else size for size in shape])

    def get_tensor_strides(self, name: str) -> Any:
        shape = [size for size in self._resolved()[name] if size is not None]
        strides = [int(np.prod(shape[index + 1 :], dtype=np.int64)) for index in range(len(shape))]
        return self._surface.names["Dims"](strides)

    def infer_shapes(self) -> list[str]:
        return [entry[0] for entry in self._engine._plan.header["inputs"] if self._shapes[entry[0]] is None]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._engine._entry(name) is None:
            return self._error(
                f"IExecutionContext::setTensorAddress: Error Code 3: API Usage Error (no tensor {name!r})"
            )
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return int(self._addresses.get(name, 0))

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.__dict__.update(_profile=int(profile_index), _warm=False)
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def execute_async_v3(self, stream_handle: int) -> bool:
        now = self._surface.settings
        if now.has("execute-segfaults"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if now.has("execute-fails"):
            return self._error("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (unspecified launch failure)")
        ready = self._ready()
        if ready is None:
            return False
        try:
            stream = DEVICE.stream(int(stream_handle))
            if stream.capturing and (now.has("capture-fails") or not self._warm):
                why = (
                    "operation not permitted when stream is capturing"
                    if self._warm
                    else "not run since its shapes were set"
                )
                stream.broken = True
                return self._error(f"IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime ({why})")
            if int(stream_handle) == 0:
                say(self._logger, "WARNING", "Using default stream in enqueueV3() may lead to performance issues")
            DEVICE.enqueue(int(stream_handle), lambda: _execute(self._engine, *ready))
        except CudaError as error:
            return self._error(f"IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime ({error})")
        self.__dict__["_warm"] = True
        if self._profiler is not None:
            for kernel in self._engine._plan.header["layers"]:
                self._profiler.report_layer_time(kernel["name"], 0.01)
        return True

    def execute_v2(self, bindings: Any) -> bool:
        for entry, address in zip(self._engine._entries(), bindings, strict=True):
            self._addresses[entry[0]] = int(address)
        ready = self._ready()
        if ready is None or self._surface.settings.has("execute-fails"):
            return self._error("IExecutionContext::executeV2: Error Code 1: Cuda Runtime (unspecified launch failure)")
        DEVICE.wait_all()
        _execute(self._engine, *ready)
        return True

    def _error(self, message: str) -> bool:
        say(self._logger, "ERROR", message)
        return False

    def _resolved(self) -> dict[str, list[int | None]]:
        """Every tensor's shape; a name of a dynamic dimension stands for what an input gave it."""
        header = self._engine._plan.header
        sizes: dict[str, int] = {}
        for name, _, shape in header["inputs"]:
            if (given := self._shapes[name]) is not None:
                sizes |= {key: size for key, size in zip(shape, given, strict=True) if isinstance(key, str)}
        found = {}
        for name, _, shape in (*header["inputs"], *header["outputs"]):
            found[name] = [size if isinstance(size, int) else sizes.get(size) for size in shape]
        return found

    def _ready(self) -> tuple[dict[str, int], dict[str, list[Any]]] | None:
        """Addresses and shapes of this run, which later changes do not touch; None when one is missing or wrong."""
        shapes = self._resolved()
        for name, shape in shapes.items():
            if any(size is None for size in shape) and self._engine._entry(name)[3] == "INPUT":
                self._error(
                    f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error (shape of {name!r} is not set)"
                )
                return None
            if not self._addresses.get(name):
                self._error(
                    f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error (Address is not set for {name})"
                )
                return None
        return dict(self._addresses), shapes


def _itemsize(kind: str) -> int:
    return 2 if kind == "BF16" else np.dtype(NUMPY[kind]).itemsize


def _dynamic(shape: list[Any]) -> bool:
    return any(not isinstance(size, int) for size in shape)


def _execute(engine: Any, addresses: dict[str, int], shapes: dict[str, list[Any]]) -> None:
    now = engine._surface.settings
    if now.has("sticky-error"):
        DEVICE.sticky = ILLEGAL_ADDRESS
        return
    header = engine._plan.header
    feeds = {}
    try:
        for name, kind, _ in header["inputs"]:
            count = int(np.prod(shapes[name], dtype=np.int64))
            size = count * _itemsize(kind)
            DEVICE.check_range(addresses[name], size, "device")
            words = ctypes.string_at(addresses[name], size)
            values = to_float32(words) if kind == "BF16" else np.frombuffer(words, NUMPY[kind])
            feeds[name] = values.reshape(shapes[name])
        given = engine._runner.run(feeds)
        for (name, kind, _), value in zip(header["outputs"], given, strict=True):
            if now.has("wrong-actions") and value.dtype.kind == "f":
                value = value + np.asarray(1, value.dtype)
            data = to_bfloat16(value) if kind == "BF16" else np.ascontiguousarray(value.astype(NUMPY[kind], copy=False))
            DEVICE.check_range(addresses[name], data.nbytes, "device")
            ctypes.memmove(addresses[name], data.ctypes.data, data.nbytes)
    except CudaError:
        DEVICE.sticky = ILLEGAL_ADDRESS  # what a kernel that reads or writes beyond its memory does


class EngineInspector:
    def _get(self) -> Any:
        return self._context

    def _set(self, value: Any) -> None:
        self.__dict__["_context"] = value

    execution_context = property(_get, _set)

    def get_engine_information(self, format: Any) -> str:
        told = layers.document(self._engine._plan.header, self._surface.lane, ignored=self._ignored())
        if format.name == "JSON":
            return json.dumps(told)
        return "\n".join(entry if isinstance(entry, str) else entry["Name"] for entry in told["Layers"])

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        told = layers.document(self._engine._plan.header, self._surface.lane, ignored=self._ignored())
        return json.dumps(told["Layers"][layer_index])

    def _ignored(self) -> bool:
        return bool(self._surface.settings.has("ignores-precision"))


WRITTEN = {kind.__name__: kind for kind in (Runtime, ICudaEngine, IRuntimeConfig, IExecutionContext, EngineInspector)}
