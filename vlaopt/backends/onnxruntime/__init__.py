"""ONNX Runtime: its sessions, and the backend on the CPU, whose engine is a graph that ONNX Runtime optimised.

Knows no other backend and no onnx; `gpu` has the backends on NVIDIA's GPUs.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Mapping, Sequence
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
from vlaopt.backends.onnxruntime.kernels import Kernel, engine_of, kernels_of
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.optional import installed_version, require

FILE = "model.onnx"
PROVIDER = "CPUExecutionProvider"
SETTINGS = {"spinning": True}

_LOG_ERRORS_ONLY = 3
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}
_EIGHT_BIT = (b"QLinear", b"QGemm", b"Integer")
# Makes a Gemm of a product and its bias before it looks for 8-bit products, which the two then are not.
_BREAKS_PAIRS = "MatMulAddFusion"
# 1.31 makes activations uint8 for x86, and fails where their layers share weights, as those of two cameras do.
_MAKES_TWICE, _MADE_TWICE = "QDQS8ToU8Transformer", "Attempt to replace the existing tensor"
_LOG_FATAL_ONLY = 4


class OnnxRuntimeSession:
    """A component opened by ONNX Runtime on the CPU."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = tuple(port_of(node) for node in session.get_inputs())
        self._outputs = tuple(port_of(node) for node in session.get_outputs())
        self._names = [port.name for port in self._outputs]
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

        A resident output is an array over ONNX Runtime's memory. The session that takes it binds it once, however
        often it runs with it.
        """
        check_feeds(self._inputs, feeds, BACKEND.name)
        bound = any(isinstance(value, Resident) for value in feeds.values())
        try:
            values = self._run_bound(feeds) if bound else self._session.run(self._names, dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise StageError(f"ONNX Runtime failed while it ran: {reason_of(error)}") from error
        outputs = dict(zip(self._names, values, strict=True))
        kept = {name: outputs[name] for name in resident}
        return outputs | {n: Resident(BACKEND.name, value.dtype.name, value.shape, value) for n, value in kept.items()}

    def _run_bound(self, feeds: Mapping[str, Value]) -> list[np.ndarray]:
        contiguous = []  # what is bound must live until the run is over
        for name, value in feeds.items():
            if not isinstance(value, Resident):
                self._held.pop(name, None)
                contiguous.append(np.asarray(value, order="C"))
                self._binding.bind_cpu_input(name, contiguous[-1])
            elif self._held.get(name) is not value:
                self._binding.bind_cpu_input(name, value.value)
                self._held[name] = value
        for name in self._names:  # anew, or the next run would write into the arrays given now
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        return [value.numpy() for value in self._binding.get_outputs()]


class OnnxRuntimeBackend:
    """Builds and opens components with ONNX Runtime.

    The file holds the optimisations that do not depend on the CPU (level `extended`: equal bytes from equal graphs,
    loads on any CPU); those that do (blocked layouts) are made while the session opens, at level `all`.
    """

    name = "onnxruntime"
    placement: Placement = "onnxruntime"
    settings: Mapping[str, Any] = SETTINGS
    native = False
    timed = True

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("onnxruntime") else "onnxruntime is not installed: pip install vlaopt"

    def version(self) -> str:
        for distribution in _DISTRIBUTIONS:
            if found := installed_version(distribution):
                return found
        if self.missing() is None:
            return str(require("onnxruntime", "cpu").__version__)
        raise EnvironmentProblem("onnxruntime is not installed", hint="pip install vlaopt")

    def runnable(self) -> str | None:
        return self.missing()

    def machine(self) -> Mapping[str, str]:
        return {}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """Optimise `graph` and name, from one profiled run of the result, the matrix layers and their precision.

        Matrix layers are convolutions, matrix products and recurrent cells. Inputs of that run are zeros (ones where
        integer or bool), 1 for every dynamic dimension. Raises StageError with ONNX Runtime's reason.
        """
        _settings(options)
        chosen, kernels, notes = graph, _profile(graph, options), []
        if graph.data:
            notes.append("kept as given: above 2 GB it is optimised only as it is opened")
        else:
            optimised = Graph(_optimise(graph))
            others = _profile(optimised, options)
            if len(others) <= len(kernels):
                chosen, kernels = optimised, others
            else:  # Seen with HardSwish after a DequantizeLinear: expanded there, it gets one dequantizer per consumer.
                fewer = f"{len(others)} kernels instead of {len(kernels)}"
                notes.append(f"kept as given: saved optimisations would run {fewer}")
        return engine_of(graph, kernels, chosen.files(FILE), notes)

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session on the CPU provider alone, no file touched. Raises InputError when one is missing or damaged."""
        graph = graph_of(files, FILE, self.name)
        try:
            session = inference_session(graph, _folding(graph, _session_options(options)))
        except StageError as error:
            raise InputError(error.message, where=FILE, hint="build the engine again") from error
        return OnnxRuntimeSession(session)


BACKEND = OnnxRuntimeBackend()


def _settings(options: EngineOptions) -> dict[str, Any]:
    unknown = sorted(set(options.settings) - set(SETTINGS))
    if unknown:
        raise InputError(f"unknown onnxruntime setting {unknown[0]!r}", hint=f"settings: {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **options.settings}
    if not isinstance(settings["spinning"], bool):
        raise InputError(f"onnxruntime setting 'spinning' is true or false, not {settings['spinning']!r}")
    return settings


def _folding(graph: Graph, chosen: Any) -> Any:
    """`chosen` with weights that are only stored in int8 made FP32 once, as the session opens, not on every run.

    ONNX Runtime keeps every DequantizeLinear for the kernels that compute in 8 bit; a graph without one has no use for
    that. Operator names stand as plain text in the file; a node of such a name would only cost the folding.
    """
    if not _eight_bit(graph.model):
        chosen.add_session_config_entry("session.disable_quant_qdq", "1")
    return chosen


def _eight_bit(model: bytes) -> bool:
    """Whether a graph may compute in 8 bit. A regular expression takes half a minute for 700 MB of weights."""
    if any(word in model for word in _EIGHT_BIT):
        return True
    at = model.find(b"QuantizeLinear")
    while at >= 0 and model[at - 2 : at] == b"De":
        at = model.find(b"QuantizeLinear", at + 1)
    return at >= 0


def plain_options(threads: int) -> Any:
    """Options of a session on any provider: all optimisations, errors alone logged, `threads` on the CPU."""
    if threads < 0:
        raise InputError(f"threads cannot be negative: {threads}")
    ort = require("onnxruntime", "cpu")
    chosen = ort.SessionOptions()
    chosen.log_severity_level = _LOG_ERRORS_ONLY
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    return chosen


def _session_options(options: EngineOptions) -> Any:
    settings = _settings(options)
    chosen = plain_options(options.threads)
    # Exact 8-bit products on x86 CPUs without VNNI, where weights above 64 would saturate.
    chosen.add_session_config_entry("session.x64quantprecision", "1")
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings["spinning"] else "0")
    return chosen


def inference_session(graph: Graph, options: Any, providers: Sequence[tuple[str, dict[str, Any]]] = ()) -> Any:
    """An InferenceSession on these providers, by name and options, the preferred one first; on the CPU without any.

    Raises StageError with ONNX Runtime's reason, EnvironmentProblem where it would take other providers.
    """
    ort = require("onnxruntime", "cpu")
    wanted = [name for name, _ in providers] or [PROVIDER]
    try:
        # Always, or ONNX Runtime would look for the data of a graph that has none in the working directory.
        name, data = (graph.data_name, graph.data) if graph.data else ("none", b"none")
        options.add_external_initializers_from_files_in_memory([name], [data], [len(data)])
        disabled = [_BREAKS_PAIRS] if _eight_bit(graph.model) else []
        session = _opened(ort, graph.model, options, [*providers] or wanted, disabled)
        # Kept to open it again with other providers: as much memory as the weights take in the session itself.
        session._model_bytes = None
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        raise StageError(f"ONNX Runtime refuses the graph: {reason_of(error)}") from error
    found = session.get_providers()
    if found[: len(wanted)] != wanted or {*found} - {*wanted, PROVIDER}:
        raise EnvironmentProblem(f"ONNX Runtime chose {', '.join(found)} instead of {', '.join(wanted)}")
    return session


def _opened(ort: Any, model: bytes, options: Any, providers: Sequence[Any], disabled: Sequence[str]) -> Any:
    """A session; without the optimiser that fails on some graphs where it does, which is as exact and slower."""
    level, options.log_severity_level = options.log_severity_level, _LOG_FATAL_ONLY  # what fails is raised too
    try:
        return ort.InferenceSession(
            model, options, providers=providers, disabled_optimizers=[*disabled], enable_fallback=0
        )
    except Exception as error:
        if _MADE_TWICE not in str(error):
            raise
    options.log_severity_level = level
    return ort.InferenceSession(
        model, options, providers=providers, disabled_optimizers=[*disabled, _MAKES_TWICE], enable_fallback=0
    )


def _optimise(graph: Graph) -> bytes:
    ort = require("onnxruntime", "cpu")
    with scratch_folder() as folder:
        path = folder / FILE
        chosen = _session_options(EngineOptions(threads=1))
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        chosen.optimized_model_filepath = str(path)
        inference_session(graph, chosen)
        return path.read_bytes()


def _profile(graph: Graph, options: EngineOptions) -> list[Kernel]:
    """The kernels of one run of `graph`, opened as `open` does, each node once however often a loop repeats it."""
    with scratch_folder() as folder:
        chosen = _folding(graph, _session_options(options))
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(folder / "profile")
        session = inference_session(graph, chosen)
        feeds = {port.name: filler(port) for port in map(port_of, session.get_inputs())}
        try:
            OnnxRuntimeSession(session).run(feeds)
        finally:
            path = Path(session.end_profiling())
        events = json.loads(path.read_text())
    kernels = kernels_of(events)
    strangers = sorted({kernel.provider for kernel in kernels} - {PROVIDER})
    if strangers:
        raise EnvironmentProblem(f"ONNX Runtime ran nodes on {', '.join(strangers)} instead of {PROVIDER}")
    return kernels


def filler(port: Port) -> np.ndarray:
    """What an input of unknown meaning is fed: zeros, ones where integer or bool, 1 for every dynamic dimension."""
    # Integers are indices or masks: 1 divides, is inside every table and leaves something unmasked; 0 need not.
    fill = 0 if port.dtype.startswith("float") else 1
    return np.full([1 if size == -1 else size for size in port.shape], fill, dtype=port.dtype)


def port_of(node: Any) -> Port:
    """One of a session's inputs or outputs. Raises StageError for a type that numpy lacks."""
    if node.type not in _DTYPES:
        raise StageError(f"{node.name!r} is a {node.type}, which numpy cannot hold")
    return Port(node.name, _DTYPES[node.type], tuple(size if isinstance(size, int) else -1 for size in node.shape))


def reason_of(error: Exception) -> str:
    """ONNX Runtime's message on one line, without its error code and the C++ signature it was raised in."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return re.sub(r"^/\S+:\d+ .+?\) (?=[A-Z])", "", text).strip()
