"""The building half of the library: builder, network, parser, config, profiles, timing caches."""

from __future__ import annotations

import json
import os
import signal
import weakref
from pathlib import Path
from typing import Any

from standin import layers, parsing
from standin.logger import say
from standin.network import ByHand
from standin.onnx_file import OnnxGraph
from standin.plan import Plan, tag

PHASES = (
    ("Building engine", None, 6),
    ("Cloning network graph", "Building engine", 3),
    ("Building engine from subgraph", "Building engine", 1),
    ("Optimizing graph", "Building engine from subgraph", 5),
    ("Timing graph nodes", "Building engine from subgraph", None),
)
"""Some of the real builder's phases: name, the phase around it, steps (None: one per layer)."""


class Dims(tuple):
    """A shape: a tuple that equals lists too."""

    MAX_DIMS = 8

    def __new__(cls, shape: Any = ()) -> Any:
        return tuple.__new__(cls, tuple(int(size) for size in shape))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, list | tuple) else NotImplemented

    __hash__ = tuple.__hash__

    def __repr__(self) -> str:
        return repr(tuple(self))


class HostMemory(bytes):
    """What the library gives as IHostMemory: a buffer with a size, and no method of bytes."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in ("nbytes", "dtype", "_kind"):
            return object.__getattribute__(self, name)
        raise AttributeError(f"IHostMemory has no {name}")

    @property
    def nbytes(self) -> int:
        return len(self)

    @property
    def dtype(self) -> Any:
        return type(self)._kind


def host_memory(surface: Any, data: bytes) -> Any:
    return surface.names["IHostMemory"](data)


class Builder:
    """Builds nothing: what it gives runs by ONNX Runtime."""

    max_threads = property(lambda self: 1, lambda self, value: None)
    num_DLA_cores = property(lambda self: 0)
    platform_has_fast_fp16 = property(lambda self: True)
    platform_has_fast_int8 = property(lambda self: True)
    platform_has_tf32 = property(lambda self: float(self._surface.settings.sm) >= 8.0)
    logger = property(lambda self: self.__dict__["_logger"])

    def __init__(self, logger: Any) -> None:
        if self._surface.settings.has("no-driver") or self._surface.settings.has("no-gpu"):
            code = "35: CUDA driver version is insufficient for CUDA runtime version"
            say(
                logger,
                "ERROR",
                f"createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure: {code})",
            )
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.__dict__["_logger"] = logger

    def create_network(self, flags: int) -> Any:
        names = self._surface.names
        strong = self._surface.lane.startswith("11")
        flag = names["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
        known = 0
        for member in names["NetworkDefinitionCreationFlag"].__members__.values():
            known |= 1 << int(member)
        if int(flags) & ~known:
            say(
                self._logger,
                "ERROR",
                "IBuilder::createNetworkV2: Error Code 3: API Usage Error (Parameter check failed)",
            )
            return None
        strong = strong or bool(int(flags) >> int(flag) & 1)
        return names["INetworkDefinition"].make(
            _flags=int(flags), _strong=strong, _name="Unnamed Network 0", _graph=None, _layers=[], _io=([], []),
            _builder=self, _logger=self._logger, _parser=lambda: True, _model=b"", _data=b"", _data_name="",
        )  # fmt: skip

    def create_builder_config(self) -> Any:
        return self._surface.names["IBuilderConfig"].make(_logger=self._logger, **_defaults(self._surface))

    def create_optimization_profile(self) -> Any:
        return self._surface.names["IOptimizationProfile"].make(_shapes={})

    def is_network_supported(self, network: Any, config: Any) -> bool:
        return _refusal(self, network, config) is None

    def reset(self) -> None:
        """Nothing is kept between builds."""

    def build_serialized_network(self, network: Any, config: Any, kernel_text: Any = None) -> Any:
        plan = _build(self, network, config)
        return None if plan is None else host_memory(self._surface, plan.pack())


def _build(builder: Any, network: Any, config: Any) -> Plan | None:
    surface, now, logger = builder._surface, builder._surface.settings, builder._logger
    if network._parser() is None:
        raise RuntimeError("stand-in: the parser is gone, and with it the weights that the network points to")
    if problem := _refusal(builder, network, config):
        say(logger, "ERROR", problem)
        return None
    found = layers.derive(network._graph, strong=network._strong, flags=config._names(), wanted=_constraints(network))
    if not _report(config, [layer["name"] for layer in found], now):
        say(logger, "ERROR", "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Build was cancelled)")
        return None
    _time(surface, config, found, logger)
    size = layers.weight_bytes(network._graph, found)
    say(logger, "INFO", f"Total Activation Memory: {layers.activation_bytes(network._graph)} bytes")
    say(logger, "INFO", f"Total Weights Memory: {size} bytes")
    say(logger, "INFO", f"Engine generation completed; {len(found)} layers")
    header = {
        "tag": tag(surface.version, now),
        "strong": network._strong,
        "flags": config._names(),
        "version_compatible": "VERSION_COMPATIBLE" in config._names(),
        "hardware_compatibility_level": config._hardware.name,
        "verbosity": config._verbosity.name,
        "name": network._name,
        "layers": found,
        "bf16": "BF16" in network._graph.types.values(),
        "weights_bytes": size,
        "activation_bytes": layers.activation_bytes(network._graph),
        "workspace_bytes": config._pools.get("WORKSPACE", 0),
        "optimization_level": config._level,
        "inputs": [[port.name, port.type, list(port.shape)] for port in network._graph.inputs],
        "outputs": [[port.name, port.type, list(port.shape)] for port in network._graph.outputs],
        "profiles": [profile._shapes for profile in config._profiles],
    }
    return Plan(header, network._model, network._data, network._data_name)


def _refusal(builder: Any, network: Any, config: Any) -> str | None:
    """Why the builder would give None, in its own words; some faults kill the process here."""
    now = builder._surface.settings
    if now.has("builder-killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if now.has("builder-segfaults"):
        os.kill(os.getpid(), signal.SIGSEGV)
    usage = "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error"
    if not network._io[1]:
        return f"{usage} (Network must have at least one output. In validate at optimizer/api/network.cpp:3810)"
    flags = set(config._names())
    precision = flags & {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}
    if network._strong and precision:
        return f"{usage} (Strongly typed networks do not take the precision flag k{sorted(precision)[0]}.)"
    if now.has("strong-refused") and network._strong and now.lane == "10.3":
        return "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[stand-in]}.)"
    if now.has("build-none"):
        return "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[stand-in]}.)"
    if now.has("out-of-memory"):
        return (
            "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory); Requested size was "
            "1073741824 bytes."
        )
    if not network._strong and network._graph.quantized and not flags & {"INT8", "FP8", "INT4", "FP4"}:
        return (
            f"{usage} (Int8 precision has been set for a layer or layer output, but int8 is not configured in the "
            "builder)"
        )
    held, sm = set(network._graph.types.values()), float(now.sm)
    for kind, least in (("FP8", 8.9), ("FP4", 10.0), ("BF16", 8.0)):
        if kind in held and sm < least:
            return f"{usage} (Networks with {kind} layers require hardware with {kind} support, this is SM {now.sm}.)"
    dynamic = [port for port in network._graph.inputs if any(isinstance(size, str) for size in port.shape)]
    if dynamic and not config._profiles:
        return (
            f"{usage} (Network has dynamic or shape inputs, but no optimization profile has been defined. In validate "
            "at optimizer/api/network.cpp:4023)"
        )
    for port in dynamic:
        for index, profile in enumerate(config._profiles):
            if port.name not in profile._shapes:
                return f"{usage} (Optimization profile {index} is missing values for dynamic input {port.name})"
    return None


def _constraints(network: Any) -> dict[str, str]:
    """Precisions that a user set on layers of a weakly typed network."""
    return {layer._node.name: layer._precision.name for layer in network._layers if layer._node and layer._precision}


def _report(config: Any, names: list[str], now: Any) -> bool:
    """Tell the progress monitor of a build; False when it cancels."""
    monitor = config._monitor
    if monitor is None:
        return True
    open_phases: list[str] = []
    for name, parent, steps in PHASES:
        while open_phases and open_phases[-1] != parent:
            monitor.phase_finish(open_phases.pop())
        count = len(names) if steps is None else steps
        monitor.phase_start(name, parent, count)
        open_phases.append(name)
        for step in range(count):
            if not monitor.step_complete(name, step):
                return False
    while open_phases:
        monitor.phase_finish(open_phases.pop())
    return True


def _time(surface: Any, config: Any, found: list[dict[str, Any]], logger: Any) -> None:
    """Look every layer up in the timing cache, and put in what was not there."""
    cache = config._cache
    if cache is None or "DISABLE_TIMING_CACHE" in config._names():
        say(logger, "INFO", "Local timing cache in use. Profiling results in this builder pass will not be stored.")
        surface.settings.note("timed", len(found), 0)
        return
    say(logger, "INFO", "Global timing cache in use. Profiling results in this builder pass will be stored.")
    keys = {f"{layer['type']}:{layer['precision']}:{layer['weights']}" for layer in found}
    surface.settings.note("timed", len(keys - cache._keys), len(keys & cache._keys))
    cache._keys.update(keys)


class INetworkDefinition(ByHand):
    """Filled by the parser, or, as far as `ByHand` goes, layer by layer."""

    num_inputs = property(lambda self: len(self._io[0]))
    num_outputs = property(lambda self: len(self._io[1]))
    num_layers = property(lambda self: len(self._layers))
    flags = property(lambda self: self._flags)
    has_implicit_batch_dimension = property(lambda self: False)
    builder = property(lambda self: self._builder)

    def _get_name(self) -> str:
        return self._name

    def _set_name(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError("name is a str")
        self.__dict__["_name"] = value

    name = property(_get_name, _set_name)

    def get_input(self, index: int) -> Any:
        return self._io[0][index] if 0 <= index < len(self._io[0]) else None

    def get_output(self, index: int) -> Any:
        return self._io[1][index] if 0 <= index < len(self._io[1]) else None

    def get_layer(self, index: int) -> Any:
        return self._layers[index] if 0 <= index < len(self._layers) else None

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)


class ITensor:
    name = property(lambda self: self._name, lambda self, value: self.__dict__.update(_name=str(value)))
    dtype = property(lambda self: self._dtype)
    shape = property(lambda self: self._surface.names["Dims"](self._shape))
    is_network_input = property(lambda self: self._mode == "input")
    is_network_output = property(lambda self: self._mode == "output")
    is_shape_tensor = property(lambda self: False)
    is_execution_tensor = property(lambda self: True)
    location = property(lambda self: self._surface.names["TensorLocation"].DEVICE)

    def get_dimension_name(self, index: int) -> Any:
        name = self._dims[index] if 0 <= index < len(self._dims) else None
        return name if isinstance(name, str) and name != "?" else None


class ILayer:
    name = property(lambda self: self._name)
    type = property(lambda self: self._type)
    metadata = property(lambda self: self._metadata)
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def _get_precision(self) -> Any:
        return self._precision or self._surface.names["DataType"].FLOAT

    def _set_precision(self, value: Any) -> None:
        if not isinstance(value, self._surface.names["DataType"]):
            raise TypeError("precision is a DataType")
        self.__dict__["_precision"] = value

    precision = property(_get_precision, _set_precision)
    precision_is_set = property(lambda self: self._precision is not None)

    def reset_precision(self) -> None:
        self.__dict__["_precision"] = None

    def get_input(self, index: int) -> Any:
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index: int) -> Any:
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    def get_output_type(self, index: int) -> Any:
        return self._types.get(index) or self._outputs[index].dtype

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._types[index] = dtype

    def output_type_is_set(self, index: int) -> bool:
        return index in self._types

    def reset_output_type(self, index: int) -> None:
        self._types.pop(index, None)


class OnnxParser:
    num_errors = property(lambda self: len(self._errors))
    num_subgraphs = property(lambda self: 1 if self._network._graph is not None else 0)
    flags = property(lambda self: self._flags, lambda self, value: self.__dict__.update(_flags=int(value)))

    def __init__(self, network: Any, logger: Any) -> None:
        self.__dict__.update(_network=network, _logger=logger, _errors=[], _flags=1)
        network.__dict__["_parser"] = weakref.ref(self)

    def parse(self, model: Any, path: str | None = None) -> bool:
        return _parse(self, bytes(model), Path(path).parent if path else None)

    def parse_from_file(self, model: str) -> bool:
        try:
            data = Path(model).read_bytes()
        except OSError:
            say(self._logger, "ERROR", f"Failed to open file: {model}")
            return False
        return _parse(self, data, Path(model).parent)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        return op_name not in parsing.UNSUPPORTED

    def set_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []


def _parse(parser: Any, data: bytes, folder: Path | None) -> bool:
    surface, network = parser._surface, parser._network
    if surface.settings.has("parser-crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    found = parsing.parse(data, folder, strong=network._strong, lane=surface.lane)
    for message in found.warnings:
        say(parser._logger, "WARNING", message)
    if found.fault is not None or found.graph is None:
        fault = found.fault
        for message in fault.log() if fault else ["Failed to parse ONNX model from file"]:
            say(parser._logger, "ERROR", message)
        if fault:
            code = surface.names["ErrorCode"].__members__[fault.code]
            parser._errors.append(surface.names["ParserError"].make(_fault=fault, _code=code))
        return False
    network.__dict__.update(_graph=found.graph, _model=data, _data=found.data, _data_name=found.data_name)
    _fill(surface, network, found.graph)
    return True


class ParserError:
    def code(self) -> Any:
        return self._code

    def desc(self) -> str:
        return str(self._fault.description)

    def file(self) -> str:
        return str(self._fault.file)

    def func(self) -> str:
        return str(self._fault.function)

    def line(self) -> int:
        return int(self._fault.line)

    def node(self) -> int:
        return int(self._fault.index)

    def node_name(self) -> str:
        return str(self._fault.node)

    def node_operator(self) -> str:
        return str(self._fault.operator)

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


def _fill(surface: Any, network: Any, graph: OnnxGraph) -> None:
    names = surface.names

    def tensor(name: str, kind: str, shape: Any = (), mode: str = "") -> Any:
        numbers = [size if isinstance(size, int) else -1 for size in shape]
        dtype = data_type(surface, kind)
        return names["ITensor"].make(_name=name, _dtype=dtype, _shape=numbers, _dims=list(shape), _mode=mode)

    inputs = [tensor(port.name, port.type, port.shape, "input") for port in graph.inputs]
    outputs = [tensor(port.name, port.type, port.shape, "output") for port in graph.outputs]
    network.__dict__["_io"] = (inputs, outputs)
    made = []
    for name, weight in graph.weights.items():
        given = tensor(name, weight.type, weight.shape)
        made.append(_layer(surface, name, "CONSTANT", None, [], [given]))
    for node in graph.nodes:
        sides = [
            [tensor(name, graph.types.get(name, "FLOAT")) for name in side if name]
            for side in (node.inputs, node.outputs)
        ]
        made.append(_layer(surface, node.name, layers.LAYER_TYPES.get(node.operator, "IDENTITY"), node, *sides))
    network.__dict__["_layers"] = made


def _layer(surface: Any, name: str, kind: str, node: Any, inputs: list[Any], outputs: list[Any]) -> Any:
    known = surface.names["LayerType"].__members__
    return surface.names["ILayer"].make(
        _name=name, _type=known.get(kind, known["IDENTITY"]), _metadata=f"[ONNX Layer: {name}]" if node else "",
        _inputs=inputs, _outputs=outputs, _node=node, _precision=None, _types={},
    )  # fmt: skip


def data_type(surface: Any, kind: str) -> Any:
    """The library's name for an ONNX element type; it has no float64 and no unsigned 16-bit."""
    known = surface.names["DataType"].__members__
    return known[kind] if kind in known else known["FLOAT" if kind == "DOUBLE" else "INT32"]


def _defaults(surface: Any) -> dict[str, Any]:
    names = surface.names
    return {
        "_flags": 1 << int(names["BuilderFlag"].TF32),
        "_pools": {},
        "_level": 3,
        "_monitor": None,
        "_cache": None,
        "_profiles": [],
        "_aux_streams": 0,
        "_timings": 1,
        "_tactics": 24,
        "_calibrator": None,
        "_verbosity": names["ProfilingVerbosity"].LAYER_NAMES_ONLY,
        "_hardware": names["HardwareCompatibilityLevel"].NONE,
        "_capability": names["EngineCapability"].STANDARD,
        "_features": {},
    }


def _kept(key: str, kind: str) -> property:
    """A property of the config that takes only values of this kind: a class of the surface, or "int"."""

    def read(self: Any) -> Any:
        return self.__dict__[key]

    def write(self: Any, value: Any) -> None:
        none_allowed = kind in ("IProgressMonitor", "IInt8Calibrator")
        wanted = int if kind == "int" else self._surface.names[kind]
        if not (isinstance(value, wanted) or (value is None and none_allowed)) or isinstance(value, bool):
            raise TypeError(f"(): incompatible function arguments: {kind} is wanted, not {value!r}")
        self.__dict__[key] = value

    return property(read, write)


class IBuilderConfig:
    profiling_verbosity = _kept("_verbosity", "ProfilingVerbosity")
    hardware_compatibility_level = _kept("_hardware", "HardwareCompatibilityLevel")
    engine_capability = _kept("_capability", "EngineCapability")
    progress_monitor = _kept("_monitor", "IProgressMonitor")
    int8_calibrator = _kept("_calibrator", "IInt8Calibrator")
    max_aux_streams = _kept("_aux_streams", "int")
    avg_timing_iterations = _kept("_timings", "int")
    flags = _kept("_flags", "int")
    num_optimization_profiles = property(lambda self: len(self._profiles))

    def _set_level(self, value: int) -> None:
        if not isinstance(value, int):
            raise TypeError("(): incompatible function arguments: an int is wanted")
        if not 0 <= value <= 5:
            say(self._logger, "ERROR", "IBuilderConfig::setBuilderOptimizationLevel: Error Code 3: API Usage Error")
            return
        self.__dict__["_level"] = value

    builder_optimization_level = property(lambda self: self._level, _set_level)

    def _names(self) -> list[str]:
        members = self._surface.names["BuilderFlag"].__members__.items()
        return sorted(name for name, member in members if self._flags >> int(member) & 1)

    def set_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        default = self._surface.settings.memory_mib << 20 if pool.name in ("WORKSPACE", "TACTIC_DRAM") else 0
        return int(self._pools.get(pool.name, default))

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._features[feature.name] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        return bool(self._features.get(feature.name, False))

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self.__dict__["_tactics"] = int(tactic_sources)
        return True

    def get_tactic_sources(self) -> int:
        return int(self._tactics)

    def add_optimization_profile(self, profile: Any) -> int:
        if not profile._shapes:
            say(self._logger, "ERROR", "IBuilderConfig::addOptimizationProfile: Error Code 4: API Usage Error")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        data = bytes(serialized_timing_cache)
        made = self._surface.names["ITimingCache"].make(_keys=set(), _tag=_cache_tag(self._surface))
        if not data:
            return made
        try:
            found = json.loads(data.removeprefix(_CACHE_MAGIC)) if data.startswith(_CACHE_MAGIC) else None
        except ValueError:
            found = None
        if found is None or found["tag"]["tensorrt"] != self._surface.version:
            say(self._logger, "WARNING", "The timing cache will not be used!")
            say(self._logger, "WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.")
            return made
        made.__dict__.update(_keys=set(found["keys"]), _tag=found["tag"])
        return made

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._tag != _cache_tag(self._surface) and not ignore_mismatch:
            say(
                self._logger, "ERROR",
                "IBuilderConfig::setTimingCache: Error Code 4: API Usage Error (The timing cache is of another device)",
            )  # fmt: skip
            return False
        self.__dict__["_cache"] = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def reset(self) -> None:
        self.__dict__.update(_defaults(self._surface))


_CACHE_MAGIC = b"timing-cache-standin\n"


def _cache_tag(surface: Any) -> dict[str, str]:
    return {key: value for key, value in tag(surface.version, surface.settings).items() if key != "os"}


class ITimingCache:
    def serialize(self) -> Any:
        text = json.dumps({"tag": self._tag, "keys": sorted(self._keys)})
        return host_memory(self._surface, _CACHE_MAGIC + text.encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if input_cache._tag != self._tag and not ignore_mismatch:
            return False
        self._keys.update(input_cache._keys)
        return True

    def reset(self) -> bool:
        self._keys.clear()
        return True


class IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        sizes = [list(map(int, shape)) for shape in (min, opt, max)]
        same = len({len(shape) for shape in sizes}) == 1
        if not same or not all(low <= mid <= high for low, mid, high in zip(*sizes, strict=True)):
            raise ValueError(f"Shape provided for {input} is inconsistent with other shapes.")
        self._shapes[input] = sizes

    def get_shape(self, input: str) -> list[Any]:
        return [self._surface.names["Dims"](shape) for shape in self._shapes.get(input, [])]

    def __bool__(self) -> bool:
        return True


WRITTEN = {
    kind.__name__: kind
    for kind in (
        Builder, INetworkDefinition, ITensor, ILayer, OnnxParser, ParserError, IBuilderConfig, ITimingCache,
        IOptimizationProfile,
    )
}  # fmt: skip
