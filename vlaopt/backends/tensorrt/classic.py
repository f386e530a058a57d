"""Classic TensorRT, 10.3 to 11: builds and runs engines for the GPU of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Placement, Session
from vlaopt.backends.tensorrt import cuda
from vlaopt.backends.tensorrt import log as logs
from vlaopt.backends.tensorrt.building import Draft, Refused, configure, parsed, settings_of
from vlaopt.backends.tensorrt.inspection import Inspection, inspect
from vlaopt.backends.tensorrt.library import CLASSIC, numbers
from vlaopt.backends.tensorrt.plans import (
    FILE,
    HOST_CODE,
    SETTINGS,
    WHOLLY_STRONG,
    build_settings,
    check_gpu,
    machine_of,
    needs_of,
    weak_types,
)
from vlaopt.backends.tensorrt.session import TensorRtSession
from vlaopt.backends.tensorrt.timing_cache import TimingCache, cache_path
from vlaopt.errors import EnvironmentProblem, InputError, StageError

_FLAGS = {
    "float16": "FP16",
    "bfloat16": "BF16",
    "int8": "INT8",
    "float8e4m3fn": "FP8",
    "int4": "INT4",
    "float4e2m1": "FP4",
}
"""Precisions that a weakly typed build must be allowed, by the element types of the graph."""


@dataclass(frozen=True)
class TensorRtBackend:
    """Builds and opens components with TensorRT."""

    name: str = "tensorrt"
    placement: Placement = "tensorrt"
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    native: bool = True
    timed: bool = True

    def missing(self) -> str | None:
        return CLASSIC.missing()

    def version(self) -> str:
        return CLASSIC.version()

    def runnable(self) -> str | None:
        return self.missing() or cuda.problem() or CLASSIC.problem()

    def machine(self) -> Mapping[str, str]:
        version = self.version() if CLASSIC.problem() is None else None
        gpu = cuda.device() if cuda.problem() is None else None
        return machine_of(version, gpu.name if gpu else None, gpu.sm if gpu else None)

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """The engine for the GPU of this machine, strongly typed, and what its inspector tells of it.

        Where TensorRT before 10.12 does not build it so, it is built weakly typed, with the precisions of the graph
        allowed; `facts` say which. Raises StageError with the parser's or the builder's reason, EnvironmentProblem
        where there is no TensorRT or no GPU, InputError for settings that cannot be.
        """
        settings = build_settings(options, self.name)
        if reason := self.runnable():
            raise EnvironmentProblem(f"a tensorrt engine cannot be built here: {reason}")
        gpu, version = cuda.device(), self.version()
        check_gpu(options, gpu.name, gpu.sm)
        build = _Build(CLASSIC.load(), graph, settings, options, version, gpu)
        plan, typing = build.plan()
        told = build.inspect(plan)
        return Engine(
            files={FILE: plan},
            precisions=told.precisions,
            notes=tuple(build.notes),
            layers=told.layers,
            needs=needs_of(machine_of(version, gpu.name, gpu.sm), settings),
            facts={**told.facts, "typing": typing, "driver": build.device.driver, **build.facts},
        )

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session on the first GPU. Raises EnvironmentProblem when this machine or its GPU cannot run the engine.

        A plan is native code, and one that is version compatible brings host code too: whoever calls this must trust
        the bytes.
        """
        if set(files) != {FILE}:
            raise InputError(f"a tensorrt engine is one file {FILE}, not {', '.join(sorted(files)) or 'none'}")
        settings = settings_of(options, SETTINGS, self.name)
        if reason := self.runnable():
            raise EnvironmentProblem(f"a tensorrt engine cannot run here: {reason}")
        trt = CLASSIC.load()
        log = logs.collector(trt)
        engine = _deserialized(trt, files[FILE], settings, log)
        if engine is None:
            raise EnvironmentProblem(
                f"TensorRT cannot load the engine: {logs.reason(log)}",
                hint="it loads where it was built; build it again here: vlaopt engine ARTIFACT",
            )
        context = engine.create_execution_context()
        if context is None:
            memory = logs.ran_out_of_memory(log.errors)
            raise EnvironmentProblem(
                f"TensorRT cannot make an execution context: {logs.reason(log)}",
                hint="close other programs that use the GPU" if memory else None,
            )
        return TensorRtSession(
            trt, engine, context, cuda.Stream(), cuda_graph=settings["cuda_graph"], log=log, cache=options.cache
        )


BACKEND = TensorRtBackend()


class _Build:
    """One build of one graph: what it is made with, and the notes and facts that it leaves."""

    def __init__(
        self,
        trt: Any,
        graph: Graph,
        settings: Mapping[str, Any],
        options: EngineOptions,
        version: str,
        device: cuda.Device,
    ) -> None:
        self.trt, self.graph, self.settings, self.options = trt, graph, settings, options
        self.version, self.device = version, device
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def plan(self) -> tuple[bytes, str]:
        """The serialized engine and how it is typed."""
        try:
            return self._built(strong=True), "strong"
        except Refused as refused:
            if numbers(self.version) >= WHOLLY_STRONG or refused.hint == logs.MEMORY_HINT:
                raise
            self.notes.append(f"weakly typed: strongly typed, {refused.message}")
        return self._built(strong=False), "weak"

    def inspect(self, plan: bytes) -> Inspection:
        """What the engine tells once it is loaded. Raises StageError when this TensorRT does not load it."""
        log = logs.collector(self.trt)
        engine = _deserialized(self.trt, plan, self.settings, log)
        if engine is None:
            raise StageError(f"TensorRT does not load the engine that it built: {logs.reason(log)}")
        return inspect(self.trt, engine, self.graph)

    def _built(self, *, strong: bool) -> bytes:
        draft = parsed(self.trt, CLASSIC.name, self.graph, strong=strong)
        configure(draft, self.settings, self.options)
        self._bound_memory(draft)
        self._make_compatible(draft)
        if not strong:
            self._allow_precisions(draft)
        cache = self._timing_cache(draft)
        plan = draft.build()
        if (weights := logs.total_bytes(draft.log, "Weights")) is not None:
            self.facts["weights_bytes"] = weights
        if cache is not None:
            cache.keep()
            self.notes += cache.notes
            self.facts["timing_cache"] = cache.state
        return plan

    def _bound_memory(self, draft: Draft) -> None:
        """Where the GPU shares its memory with all else that runs, kernels are tried within what is free now."""
        if self.device.integrated:
            pool = self.trt.MemoryPoolType.TACTIC_DRAM
            limit = min(draft.config.get_memory_pool_limit(pool), cuda.free_memory_mib() << 20)
            draft.config.set_memory_pool_limit(pool, limit)

    def _make_compatible(self, draft: Draft) -> None:
        if self.settings["version_compatible"]:
            draft.config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
            self.notes.append(HOST_CODE)
        if self.settings["hardware_compatible"]:
            draft.config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def _allow_precisions(self, draft: Draft) -> None:
        """Let a weakly typed build use the types that the graph holds."""
        known = self.trt.BuilderFlag.__members__
        held = weak_types(self.graph)
        flags = [flag for dtype, flag in _FLAGS.items() if dtype in held and flag in known]
        for flag in flags:
            draft.config.set_flag(known[flag])
        self.facts["flags"] = flags

    def _timing_cache(self, draft: Draft) -> TimingCache | None:
        if self.options.cache is None:
            return None
        path = cache_path(self.options.cache, self.version, self.device.sm, self.device.name)
        return TimingCache(draft.config, path)


def _deserialized(trt: Any, plan: bytes, settings: Mapping[str, Any], log: logs.Log) -> Any:
    """The engine of a plan, None where TensorRT refuses it."""
    runtime = trt.Runtime(log)
    if settings["version_compatible"]:
        runtime.engine_host_code_allowed = True
    return runtime.deserialize_cuda_engine(plan)
