"""The builder: it gives plans of what the parser read, tells its phases, and refuses as the real one does."""

from __future__ import annotations

import os
import signal
from typing import Any

from standin import layers
from standin.config import defaults
from standin.logger import say
from standin.natives import host_memory
from standin.plan import Plan, tag

PHASES = (
    ("Building engine", None, 6),
    ("Cloning network graph", "Building engine", 3),
    ("Building engine from subgraph", "Building engine", 1),
    ("Optimizing graph", "Building engine from subgraph", 5),
    ("Timing graph nodes", "Building engine from subgraph", None),
)
"""Some of the real builder's phases: name, the phase around it, steps (None: one per layer)."""


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
        return self._surface.names["IBuilderConfig"].make(_logger=self._logger, **defaults(self._surface))

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


WRITTEN = {"Builder": Builder}
