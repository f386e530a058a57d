"""TensorRT for RTX: builds engines for RTX-class GPUs on any machine, runs them where an NVIDIA driver is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import ONE_OF, Engine, EngineOptions, Placement, Session
from vlaopt.backends.kept import keep, recall
from vlaopt.backends.tensorrt import cuda
from vlaopt.backends.tensorrt import log as logs
from vlaopt.backends.tensorrt.building import Refusal, Refused, configure, parsed, platform_name, settings_of
from vlaopt.backends.tensorrt.inspection import read_log
from vlaopt.backends.tensorrt.library import RTX
from vlaopt.backends.tensorrt.session import TensorRtSession
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.hashing import digest_bytes

FILE = "engine.rtx"
SETTINGS: dict[str, Any] = {"optimization_level": 3, "workspace_mib": 0, "cuda_graph": True, "profiles": {}}

_REBUILD = "build it again with this version, for this GPU: vlaopt build RECIPE"
_DRIVER = "install the newest NVIDIA driver"
_HINTS = {
    "OLD_CUDA_DRIVER": _DRIVER,
    "CUDA_ERROR": _DRIVER,
    "OLD_CUDA_RUNTIME": "install the newest tensorrt-rtx-cu13-libs",
    "INSUFFICIENT_GPU_MEMORY": "close other programs that use the GPU",
}
"""What mends an engine that does not fit, by TensorRT's `EngineInvalidityDiagnostics`; for the others, `_REBUILD`."""
_NOTE = "precision not audited: this TensorRT for RTX logs no layers when it builds"


@dataclass(frozen=True)
class RtxBackend:
    """Builds and opens components with TensorRT for RTX."""

    name: str = "tensorrt-rtx"
    placement: Placement = "tensorrt"
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    native: bool = True
    timed: bool = True

    def missing(self) -> str | None:
        return RTX.missing()

    def version(self) -> str:
        return RTX.version()

    def runnable(self) -> str | None:
        return self.missing() or cuda.problem() or RTX.problem()

    def machine(self) -> Mapping[str, str]:
        here = {"os": platform_name()}
        if self.missing() is None:
            here["tensorrt-rtx"] = self.version()
        if cuda.problem() is None:
            here["sm"] = cuda.device().sm
        return here

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """One engine, strongly typed, for every compute capability of `options` (none: the GPU of this machine).

        Raises StageError with the parser's node and reason or the builder's reason.
        """
        settings = settings_of(options, SETTINGS, self.name)
        draft = parsed(RTX.load(), RTX.name, graph)
        targets = _target(draft.trt, draft.config, options.compute_capabilities)
        configure(draft, settings, options)
        engine = draft.build()
        told = read_log(draft.log.layers, graph)
        return Engine(
            files={FILE: engine},
            precisions=told.precisions,
            notes=() if draft.log.layers else (_NOTE,),
            layers=told.layers,
            needs={"tensorrt-rtx": self.version(), "sm": ONE_OF.join(targets), "os": platform_name()},
            facts={**told.facts, **_memory(draft.log), "typing": "strong"},
        )

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session on the first GPU. Raises EnvironmentProblem when this machine or its GPU cannot run the engine.

        An engine is native code: whoever calls this must trust the bytes.
        """
        if set(files) != {FILE}:
            raise InputError(f"a tensorrt-rtx engine is one file {FILE}, not {', '.join(sorted(files)) or 'none'}")
        settings = settings_of(options, SETTINGS, self.name)
        if reason := self.runnable():
            raise EnvironmentProblem(f"a tensorrt-rtx engine cannot run here: {reason}")
        trt = RTX.load()
        log = logs.collector(trt)
        engine = _deserialized(trt, files[FILE], log)
        config = engine.create_runtime_config()
        if settings["cuda_graph"]:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        compiled = _RuntimeCache(
            config, options.cache, f"{self.version()}-sm{cuda.device().sm}-{digest_bytes(files[FILE])}"
        )
        context = engine.create_execution_context(config)
        if context is None:
            raise EnvironmentProblem(f"TensorRT for RTX cannot make an execution context: {logs.reason(log)}")
        compiled.keep()
        return TensorRtSession(trt, engine, context, cuda.Stream(), log=log, cache=options.cache)


BACKEND = RtxBackend()


def check(
    graph: Graph, compute_capability: str, profiles: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> tuple[Refusal, ...]:
    """Why NVIDIA's parser or builder refuses a graph, strongly typed, for GPUs of one compute capability like '8.9'.

    Empty where an engine can be built. `profiles` are those of dynamic dimensions, as in `settings`. Raises
    EnvironmentProblem where TensorRT for RTX cannot be imported or does not build for that compute capability,
    InputError for dimensions and profiles that do not fit each other.
    """
    trt = RTX.load()
    try:
        draft = parsed(trt, RTX.name, graph)
        _target(trt, draft.config, (compute_capability,))
        configure(draft, {**SETTINGS, "profiles": profiles}, EngineOptions())
        draft.build()
    except Refused as refused:
        return refused.refusals
    return ()


def _target(trt: Any, config: Any, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Have the engine built for these compute capabilities, or this machine's; gives them as numbers."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if re.fullmatch(r"SM\d+", name)
    }
    if unknown := [name for name in wanted if name not in known]:
        raise EnvironmentProblem(
            f"TensorRT for RTX does not build for compute capability {unknown[0]}", hint=f"it has {', '.join(known)}"
        )
    if not wanted and (reason := cuda.problem()):
        raise InputError(f"no compute capability to build for is named, and {reason}", hint="name one, like 8.9")
    chosen = [known[name] for name in wanted] or [trt.ComputeCapability.CURRENT]
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        if not config.set_compute_capability(capability, index):
            raise EnvironmentProblem(f"TensorRT for RTX refuses compute capability {capability.name}")
    return wanted or (cuda.device().sm,)


def _memory(log: logs.Log) -> dict[str, int]:
    found = {"weights_bytes": logs.total_bytes(log, "Weights"), "activation_bytes": logs.total_bytes(log, "Activation")}
    return {name: size for name, size in found.items() if size is not None}


def _deserialized(trt: Any, engine: bytes, log: logs.Log) -> Any:
    """The engine of these bytes. Raises EnvironmentProblem with the reason where this machine cannot run it."""
    runtime = trt.Runtime(log)
    validity, diagnostics = runtime.get_engine_validity(engine)
    if validity == trt.EngineValidity.INVALID:
        members = trt.EngineInvalidityDiagnostics.__members__.items()
        found = [name for name, flag in members if int(diagnostics) & int(flag)]
        raise EnvironmentProblem(
            f"the engine does not fit this machine: {', '.join(map(_words, found)) or logs.reason(log)}",
            hint=next((hint for name, hint in _HINTS.items() if name in found), _REBUILD if found else _DRIVER),
        )
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise EnvironmentProblem(f"TensorRT for RTX cannot load the engine: {logs.reason(log)}", hint=_REBUILD)
    return loaded


def _words(name: str) -> str:
    return name.lower().replace("_", " ")


class _RuntimeCache:
    """The kernels that RTX compiles for the GPU while an engine is opened, kept in `folder` for the next opening."""

    def __init__(self, config: Any, folder: Path | None, key: str) -> None:
        self._folder, self._key = folder, f"rtx-{key}"
        self._cache = config.create_runtime_cache()
        self._began = recall(folder, self._key) if folder else None
        if self._began is not None and not self._cache.deserialize(self._began):
            self._cache.reset()
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        data = bytes(self._cache.serialize()) if self._folder else b""
        if self._folder and data != self._began:
            keep(self._folder, self._key, data)
