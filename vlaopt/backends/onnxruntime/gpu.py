"""ONNX Runtime on NVIDIA's GPUs: its CUDA provider, and its TensorRT provider with CUDA behind it. Never on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlaopt.artifact.graph import Graph
from vlaopt.backends import (
    Engine,
    EngineOptions,
    Placement,
    Port,
    Resident,
    Session,
    Value,
    check_feeds,
    graph_of,
    scratch_folder,
)
from vlaopt.backends.onnxruntime import FILE, driver, filler, inference_session, plain_options, port_of, reason_of
from vlaopt.backends.onnxruntime.kernels import Kernel, engine_of, kernels_of
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.optional import installed_version, require

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"

_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")
_HINT = "pip install 'vlaopt[gpu]', then as README says, for it holds the same module as onnxruntime"
_LIBRARIES_HINT = "onnxruntime-gpu[cuda,cudnn] brings CUDA's libraries; TensorRT's must be on LD_LIBRARY_PATH"
_CUDNN_BOUND_MIB = 32
"""What cuDNN's convolutions are bound to, where they may not take all that they can use."""
_NAMED = 6
"""Nodes that a message names."""


@dataclass(frozen=True)
class GpuBackend:
    """Opens components with ONNX Runtime on `providers`, the preferred one first; the engine is the graph as given.

    A node that ends on the CPU is an error: by name while building, by ONNX Runtime itself while opening.
    """

    name: str
    providers: tuple[str, ...]
    settings: Mapping[str, Any]
    placement: Placement = "tensorrt"
    native: bool = False
    timed: bool = True

    def missing(self) -> str | None:
        folder = _libraries()
        if folder is None:
            return "onnxruntime is not installed: pip install 'vlaopt[gpu]'"
        absent = [provider for provider in self.providers if not (folder / _LIBRARIES[provider]).is_file()]
        return f"this onnxruntime has no {absent[0]}: pip install 'vlaopt[gpu]'" if absent else None

    def version(self) -> str:
        found = next(filter(None, map(installed_version, _DISTRIBUTIONS)), None)
        if found is None:
            raise EnvironmentProblem("onnxruntime is not installed", hint=_HINT)
        return found

    def runnable(self) -> str | None:
        return self.missing() or driver.problem()

    def machine(self) -> Mapping[str, str]:
        return driver.device() if driver.problem() is None else {}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """The graph as given, and what one profiled run of it tells: kernels by provider, matrix layers by precision.

        The TensorRT provider tells no precisions of what it takes. Inputs of that run are zeros (ones where integer or
        bool), 1 for every dynamic dimension. Raises StageError naming the nodes that would run on the CPU.
        """
        self._settings(options)
        if reason := self.runnable():
            raise EnvironmentProblem(f"{self.name} cannot build here: {reason}")
        kernels = self._profile(graph, options)
        elsewhere = [kernel for kernel in kernels if kernel.provider not in self.providers]
        if elsewhere:
            names = ", ".join(f"{kernel.name} ({kernel.operator})" for kernel in elsewhere[:_NAMED])
            rest = f" and {len(elsewhere) - _NAMED} more" if len(elsewhere) > _NAMED else ""
            where = ", ".join(sorted({kernel.provider for kernel in elsewhere}))
            raise StageError(
                f"{self.name} would run {len(elsewhere)} of {len(kernels)} kernels on {where}: {names}{rest}",
                hint="name another engine.backend",
            )
        if all(kernel.provider != self.providers[0] for kernel in kernels):
            raise StageError(f"{self.providers[0]} takes no node of the graph")
        return engine_of(graph, kernels, graph.files(FILE))

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session on the first GPU. Raises EnvironmentProblem with ONNX Runtime's reason where a provider is not."""
        graph = graph_of(files, FILE, self.name)
        self._settings(options)
        if reason := self.runnable():
            raise EnvironmentProblem(f"a {self.name} engine cannot run here: {reason}")
        chosen = plain_options(options.threads)
        chosen.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = self._session(graph, chosen, options)
        except StageError as error:
            raise InputError(error.message, where=FILE, hint="build the engine again") from error
        return DeviceSession(session, self.name, "cuda")

    def _settings(self, options: EngineOptions) -> dict[str, int]:
        if unknown := sorted(set(options.settings) - set(self.settings)):
            known = ", ".join(self.settings) or "none"
            raise InputError(f"unknown {self.name} setting {unknown[0]!r}", hint=f"settings: {known}")
        settings = {**self.settings, **options.settings}
        for name, value in settings.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{self.name} setting {name!r} is a number from 0 on, not {value!r}")
        if 0 < settings["workspace_mib"] < _CUDNN_BOUND_MIB:
            raise InputError(f"{self.name} cannot keep to {settings['workspace_mib']} MiB, only to {_CUDNN_BOUND_MIB}")
        return settings

    def _session(self, graph: Graph, chosen: Any, options: EngineOptions) -> Any:
        """A session on the providers. Raises EnvironmentProblem where one of them is not to be had."""
        _preload()
        providers = [(name, self._provider_options(name, graph, options)) for name in self.providers]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a provider is unknown, which the error below says
                return inference_session(graph, chosen, providers)
        except (StageError, EnvironmentProblem) as error:
            for provider in self.providers:
                if reason := _not_offered(provider):
                    raise EnvironmentProblem(f"{provider} cannot be used: {reason}", hint=_HINT) from error
                if reason := _not_loaded(provider):
                    raise EnvironmentProblem(f"{provider} cannot be used: {reason}", hint=_LIBRARIES_HINT) from error
            raise

    def _provider_options(self, provider: str, graph: Graph, options: EngineOptions) -> dict[str, Any]:
        """Of precision nothing: it is the graph's. A timing cache of another GPU is never forced."""
        settings = self._settings(options)
        if provider == CUDA:
            return {"device_id": 0, "cudnn_conv_use_max_workspace": "0" if settings["workspace_mib"] else "1"}
        chosen: dict[str, Any] = {"device_id": 0, "trt_builder_optimization_level": settings["optimization_level"]}
        if settings["workspace_mib"]:
            chosen["trt_max_workspace_size"] = settings["workspace_mib"] << 20
        if options.cache is None:
            return chosen
        folder = options.cache / self.version()
        plans = folder / "-".join((graph.digest[:16], *map(str, settings.values())))
        try:
            plans.mkdir(parents=True, exist_ok=True)
        except OSError:  # a robot whose disk is read-only builds at every start
            return chosen
        chosen |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(plans)}
        return chosen | {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(folder)}

    def _profile(self, graph: Graph, options: EngineOptions) -> list[Kernel]:
        """The kernels of one run, where the CPU may take what no provider takes, so that it can be named."""
        with scratch_folder() as folder:
            chosen = plain_options(options.threads)
            chosen.enable_profiling = True
            chosen.profile_file_prefix = str(folder / "profile")
            session = self._session(graph, chosen, options)
            opened = DeviceSession(session, self.name, "cuda")
            try:
                opened.run({port.name: filler(port) for port in opened.inputs})
            finally:
                path = Path(session.end_profiling())
            return kernels_of(json.loads(path.read_text()))


class DeviceSession:
    """A component on `device` ("cuda"; "cpu" works alike). Its residents stay in that device's memory."""

    def __init__(self, session: Any, backend: str, device: str) -> None:
        self._session, self._backend, self._device = session, backend, device
        self._inputs = tuple(port_of(node) for node in session.get_inputs())
        self._outputs = tuple(port_of(node) for node in session.get_outputs())
        self._binding = session.io_binding()
        self._held: dict[str, Resident] = {}

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Outputs by name. Raises InputError for wrong feeds and StageError when a kernel fails.

        A resident output never leaves the device; the session that takes it reads it where it is.
        """
        check_feeds(self._inputs, feeds, self._backend)
        contiguous = self._bind(feeds)  # what is bound must live until the run is over
        for port in self._outputs:  # anew, or the next run would write into what is given now
            self._binding.bind_output(port.name, self._device if port.name in resident else "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise StageError(f"ONNX Runtime failed while it ran: {reason_of(error)}") from error
        del contiguous
        values = dict(zip((port.name for port in self._outputs), self._binding.get_outputs(), strict=True))
        return {
            port.name: Resident(self._backend, port.dtype, tuple(values[port.name].shape()), values[port.name])
            if port.name in resident
            else values[port.name].numpy()
            for port in self._outputs
        }

    def _bind(self, feeds: Mapping[str, Value]) -> list[np.ndarray]:
        contiguous = []
        for name, value in feeds.items():
            if not isinstance(value, Resident):
                self._held.pop(name, None)
                contiguous.append(np.asarray(value, order="C"))
                self._binding.bind_cpu_input(name, contiguous[-1])
            elif self._held.get(name) is not value:
                self._binding.bind_ortvalue_input(name, value.value)
                self._held[name] = value
        return contiguous


CUDA_BACKEND = GpuBackend("onnxruntime-cuda", (CUDA,), {"workspace_mib": 0})
TENSORRT_BACKEND = GpuBackend("onnxruntime-tensorrt", (TENSORRT, CUDA), {"optimization_level": 3, "workspace_mib": 0})


def _libraries() -> Path | None:
    """The folder of ONNX Runtime's libraries, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("onnxruntime")
    return Path(spec.origin).parent / "capi" if spec and spec.origin else None


def _preload() -> None:
    """Load CUDA's libraries from NVIDIA's wheels, where ONNX Runtime knows how to; it prints what it does not find."""
    preload = getattr(require("onnxruntime", "gpu"), "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _not_offered(provider: str) -> str | None:
    """What ONNX Runtime has in place of a provider, or None where it has it."""
    available: Sequence[str] = require("onnxruntime", "gpu").get_available_providers()
    return None if provider in available else f"this onnxruntime has {', '.join(available)}"


def _not_loaded(provider: str) -> str | None:
    """Why a provider's library cannot be loaded, which ONNX Runtime only logs, or None where it can."""
    folder = _libraries() or Path()
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / _LIBRARIES[provider]))
    except OSError as error:
        return " ".join(str(error).split())
    return None
