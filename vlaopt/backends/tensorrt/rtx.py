"""TensorRT for RTX: builds engines for RTX-class GPUs on any machine, runs them where an NVIDIA driver is."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Placement, Session, graph_on_disk
from vlaopt.backends.tensorrt.cuda import Stream, driver_problem
from vlaopt.backends.tensorrt.session import TensorRtSession
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.optional import installed_version, require

FILE = "engine.rtx"
SETTINGS = {"workspace_mib": 0, "cuda_graph": False}

_MODULE, _EXTRA = "tensorrt_rtx_bindings", "rtx"
_HINT = "pip install 'vlaopt[rtx]'"
_NOTE = "precision not audited: TensorRT for RTX tells layers apart only where a driver is"
# What the parser logs, as a warning, before it reads uint8 as int8 and so calculates something else.
_READ_AS_INT8 = "Defaulting to INT8"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RtxBackend:
    """Builds and opens components with TensorRT for RTX."""

    name: str = "tensorrt-rtx"
    placement: Placement = "tensorrt"
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    native: bool = True
    timed: bool = True

    def missing(self) -> str | None:
        return None if importlib.util.find_spec(_MODULE) else f"{_MODULE} is not installed: {_HINT}"

    def version(self) -> str:
        found = installed_version("tensorrt-rtx-cu13-bindings") or installed_version("tensorrt-rtx-cu12-bindings")
        if found is None:
            raise EnvironmentProblem(f"{_MODULE} is not installed", hint=_HINT)
        return found

    def runnable(self) -> str | None:
        if reason := self.missing() or driver_problem():
            return reason
        return None if _has_cuda_python() else "cuda-python is not installed: pip install cuda-python"

    def machine(self) -> Mapping[str, str]:
        return {"tensorrt-rtx": self.version()}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """One engine, strongly typed, for every compute capability of `options` (none: the GPU of this machine).

        `settings.workspace_mib` bounds the scratch memory of the engine; 0 leaves TensorRT's own limit. Raises
        StageError with the parser's node and reason or the builder's reason.
        """
        settings = _settings(options)
        trt = require(_MODULE, _EXTRA)
        log = _log(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)  # must outlive the build: it holds the network's weights
        _parse(parser, graph, log)
        config = builder.create_builder_config()
        _target(trt, config, options)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if settings["workspace_mib"]:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mib"] << 20)
        if options.advance is not None:
            config.progress_monitor = _monitor(trt, options.advance)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise StageError(f"TensorRT for RTX cannot build the engine: {log.reason()}")
        return Engine(files={FILE: bytes(engine)}, precisions={}, notes=(_NOTE,))

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session on the first GPU. Raises EnvironmentProblem when this machine or its GPU cannot run the engine.

        An engine is native code: whoever calls this must trust the bytes.
        """
        if set(files) != {FILE}:
            raise InputError(f"a tensorrt-rtx engine is one file {FILE}, not {', '.join(sorted(files)) or 'none'}")
        settings = _settings(options)
        if reason := self.runnable():
            raise EnvironmentProblem(f"a tensorrt-rtx engine cannot run here: {reason}")
        trt = require(_MODULE, _EXTRA)
        stream = Stream(require("cuda.bindings.runtime", _EXTRA))
        log = _log(trt)
        runtime = trt.Runtime(log)
        _check_validity(trt, runtime, files[FILE], log)
        engine = runtime.deserialize_cuda_engine(files[FILE])
        if engine is None:
            raise EnvironmentProblem(f"TensorRT for RTX cannot load the engine: {log.reason()}", hint="build it again")
        return TensorRtSession(trt, engine, _context(trt, engine, settings["cuda_graph"], log), stream)


BACKEND = RtxBackend()


def _settings(options: EngineOptions) -> dict[str, Any]:
    unknown = sorted(set(options.settings) - set(SETTINGS))
    if unknown:
        raise InputError(f"unknown tensorrt-rtx setting {unknown[0]!r}", hint=f"settings: {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **options.settings}
    mib = settings["workspace_mib"]
    if isinstance(mib, bool) or not isinstance(mib, int) or mib < 0:
        raise InputError(f"tensorrt-rtx setting 'workspace_mib' is a number of MiB, not {mib!r}")
    if not isinstance(settings["cuda_graph"], bool):
        raise InputError(f"tensorrt-rtx setting 'cuda_graph' is true or false, not {settings['cuda_graph']!r}")
    return settings


def _has_cuda_python() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # raised when the parent package `cuda` is absent
        return False


def _parse(parser: Any, graph: Graph, log: Any) -> None:
    with graph_on_disk(graph) as path:
        parsed = parser.parse_from_file(str(path))
    if not parsed:
        problems = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise StageError(f"TensorRT for RTX refuses the graph: {'; '.join(problems) or log.reason()}")
    if any(_READ_AS_INT8 in message for message in log.warnings):
        raise StageError(
            "TensorRT for RTX would read this graph's uint8 quantization as int8",
            hint="quantize with int8 and zero point 0",
        )


def _parser_error(error: Any) -> str:
    text = re.sub(r"^Assertion failed: \S+: ", "", " ".join(error.desc().split()))
    named = error.node_name() or (f"#{error.node()}" if error.node() >= 0 else "")
    return f"node {named!r} ({error.node_operator()}): {text}" if named else text


def _target(trt: Any, config: Any, options: EngineOptions) -> None:
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if re.fullmatch(r"SM\d+", name)
    }
    wanted = options.compute_capabilities
    if unknown := [name for name in wanted if name not in known]:
        raise EnvironmentProblem(
            f"TensorRT for RTX does not build for compute capability {unknown[0]}", hint=f"it has {', '.join(known)}"
        )
    if not wanted and (reason := driver_problem()):
        raise InputError(f"no compute capability to build for is named, and {reason}", hint="name one, like 8.9")
    chosen = [known[name] for name in wanted] or [trt.ComputeCapability.CURRENT]
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        if not config.set_compute_capability(capability, index):
            raise EnvironmentProblem(f"TensorRT for RTX refuses compute capability {capability.name}")


def _check_validity(trt: Any, runtime: Any, engine: bytes, log: Any) -> None:
    validity, diagnostics = runtime.get_engine_validity(engine)
    if validity != trt.EngineValidity.INVALID:
        return
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = [name.lower().replace("_", " ") for name, flag in members if int(diagnostics) & int(flag)]
    raise EnvironmentProblem(
        f"the engine does not fit this machine: {', '.join(reasons) or log.reason()}", hint="build it again"
    )


def _context(trt: Any, engine: Any, cuda_graph: bool, log: Any) -> Any:
    config = engine.create_runtime_config()
    if cuda_graph:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    context = engine.create_execution_context(config)
    if context is None:
        raise EnvironmentProblem(f"TensorRT for RTX cannot make an execution context: {log.reason()}")
    return context


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors: a call that fails returns None and says why only here."""

        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def reason(self) -> str:
            return "; ".join(dict.fromkeys(map(_meaning, self.errors))) or "it gives no reason"

    return Log()


def _meaning(message: str) -> str:
    """A line of TensorRT's log without the names of its functions and source files."""
    text = re.sub(r"^\S+ Error Code \d+: ", "", " ".join(message.split()))
    text = re.sub(r"\[\w+\.cpp:\d+: \w+\] ", "", text)
    return re.sub(r"\.? In \w+ at \S+?:\d+", "", text)


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on to `progress`."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            progress(phase, step + 1, self.steps[phase])
            return True  # False would cancel the build

        def phase_finish(self, phase: str) -> None:
            steps = self.steps.pop(phase)
            progress(phase, steps, steps)

    return Monitor()
