"""TensorRT through its program trtexec, for machines whose Python has no TensorRT: the same graph in, a plan out."""

from __future__ import annotations

import json
import re
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlaopt.artifact.graph import Graph, GraphTensor
from vlaopt.backends import Engine, EngineOptions, Placement, Port, Session, Value, check_feeds, scratch_folder
from vlaopt.backends.tensorrt import inspection
from vlaopt.backends.tensorrt import trtexec_program as program
from vlaopt.backends.tensorrt.building import Refusal, Refused, refused, settings_of
from vlaopt.backends.tensorrt.library import numbers
from vlaopt.backends.tensorrt.log import MEMORY_HINT
from vlaopt.backends.tensorrt.plans import (
    FILE,
    HOST_CODE,
    SETTINGS,
    WHOLLY_STRONG,
    build_settings,
    check_gpu,
    machine_of,
    needs_of,
)
from vlaopt.backends.tensorrt.timing_cache import cache_path
from vlaopt.backends.tensorrt.trtexec_log import Log
from vlaopt.errors import EnvironmentProblem, InputError, StageError

PORTS = "ports.json"

_WRITTEN = ("float32", "float16", "int8", "int32", "int64", "bool")
_READ = (*_WRITTEN, "uint8")  # which it would write as characters
_TENSOR = re.compile(r'"name" : "(.*)"\s*, "dimensions" : "([\dx]*)"\s*, "values" : \[([^\]]*)\]')


@dataclass(frozen=True)
class TrtexecBackend:
    """Builds engines with trtexec, and runs them with it: one process for every call, so no time is measured."""

    name: str = "trtexec"
    placement: Placement = "tensorrt"
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    native: bool = True
    timed: bool = False

    def missing(self) -> str | None:
        return None if program.find() else f"trtexec is not found; {program.PROGRAM} may name it"

    def version(self) -> str:
        """Such as '10.13.3.9'; three parts before 10.4, which tells no build."""
        return program.probed().version

    def runnable(self) -> str | None:
        if reason := self.missing():
            return reason
        try:
            log = program.probed()
        except EnvironmentProblem as error:
            return error.message
        return None if log.sm else "trtexec finds no GPU" + (f": {log.errors[0]}" if log.errors else "")

    def machine(self) -> Mapping[str, str]:
        return _machine(program.probed()) if self.missing() is None else machine_of(None, None, None)

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """A plan for the GPU of this machine, as backend `tensorrt` builds it, and what trtexec tells of it.

        Strongly typed; before 10.12, where that fails, weakly typed with the precisions of the graph allowed. Raises
        Refused with trtexec's reasons, EnvironmentProblem where there is no trtexec or no GPU, InputError for settings
        that cannot be.
        """
        settings = build_settings(options, self.name)
        ports = {"inputs": _ports(graph.inputs(), _READ), "outputs": _ports(graph.outputs(), _WRITTEN)}
        shapes = _shapes(graph.inputs(), settings["profiles"])
        if reason := self.runnable():
            raise EnvironmentProblem(f"trtexec cannot build here: {reason}")
        here = program.probed()
        check_gpu(options, here.gpu or "GPU", here.sm or "unknown")
        advance = options.advance or (lambda phase, step, steps: None)
        advance(self.name, 0, 1)
        cache = _timing_cache(here, options.cache)
        with scratch_folder() as folder:
            for name, data in graph.files(program.ONNX).items():
                _write(folder / name, data)
            strong = program.build_arguments(settings, program.strong_typing(here.version), shapes, cache)
            typing, notes = "strong", []
            try:
                log = _build(strong, folder)
            except Refused as error:
                if numbers(here.version) >= WHOLLY_STRONG or error.hint == MEMORY_HINT:
                    raise
                typing, notes = "weak", [f"weakly typed: strongly typed, {error.message}"]
                log = _build(program.build_arguments(settings, program.weak_typing(graph), shapes, cache), folder)
            plan = (folder / FILE).read_bytes()
            found = inspection.read((folder / program.LAYERS).read_text("utf-8", "replace"), graph)
        advance(self.name, 1, 1)
        if settings["version_compatible"]:
            notes.append(HOST_CODE)
        loading = {**ports, "version_compatible": settings["version_compatible"]}
        return Engine(
            files={FILE: plan, PORTS: json.dumps(loading, sort_keys=True).encode()},
            precisions=found.precisions,
            notes=tuple(notes),
            layers=found.layers,
            needs=needs_of(_machine(here), settings),
            facts={**found.facts, **log.sizes, "typing": typing},
        )

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session that starts trtexec for every call. Raises EnvironmentProblem where there is none, or no GPU.

        A plan is native code: whoever calls this must trust the bytes.
        """
        if set(files) != {FILE, PORTS}:
            raise InputError(f"a trtexec engine is {FILE} and {PORTS}, not {', '.join(sorted(files)) or 'none'}")
        settings_of(options, SETTINGS, self.name)
        if reason := self.runnable():
            raise EnvironmentProblem(f"a plan cannot run here: {reason}")
        return TrtexecSession(files, numbers(self.version()))


BACKEND = TrtexecBackend()


class TrtexecSession:
    """One plan, run by one process of trtexec for every call. Six significant digits of the outputs come back."""

    def __init__(self, files: Mapping[str, bytes], version: tuple[int, ...]) -> None:
        try:
            loading = json.loads(files[PORTS])
            self._inputs, self._outputs = (
                tuple(Port(port["name"], port["dtype"], tuple(port["shape"])) for port in loading[side])
                for side in ("inputs", "outputs")
            )
            compatible = bool(loading["version_compatible"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("its ports cannot be read", where=PORTS, hint="build the engine again") from error
        folder = tempfile.TemporaryDirectory(prefix="vlaopt-")
        self._close = weakref.finalize(self, folder.cleanup)
        self._folder = Path(folder.name)
        self._version, self._compatible = version, compatible
        _write(self._folder / FILE, files[FILE])

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Outputs by name, arrays always. Raises InputError for wrong feeds, StageError with trtexec's reason."""
        check_feeds(self._inputs, feeds, BACKEND.name)
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        places = {name: f"{at}.bin" for at, name in enumerate(arrays)}
        for name, place in places.items():
            _write(self._folder / place, arrays[name].tobytes())
        dynamic = {port.name: arrays[port.name].shape for port in self._inputs if -1 in port.shape}
        (self._folder / program.OUTPUTS).unlink(missing_ok=True)
        arguments = program.run_arguments(self._version, places, dynamic, version_compatible=self._compatible)
        log, status = program.run(arguments, self._folder)
        if status or not log.passed or log.errors:
            raise StageError(f"trtexec cannot run the plan: {log.told(status)}", hint=log.hint(status))
        return self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = {match[0]: match for match in _TENSOR.findall((self._folder / program.OUTPUTS).read_text("utf-8"))}
            return {port.name: _array(port, *found[port.name][1:]) for port in self._outputs}
        except (OSError, KeyError, ValueError) as error:
            raise StageError(f"trtexec wrote outputs that cannot be read: {error}", where=program.OUTPUTS) from error


def _build(arguments: Sequence[str], folder: Path) -> Log:
    """The log of a build that gave a plan and its layers. Raises Refused otherwise."""
    log, status = program.run(arguments, folder)
    if log.reads_uint8_as_int8:
        reason = Refusal("", "", "trtexec would read this graph's uint8 quantization as int8")
        raise refused("trtexec refuses the graph", [reason], hint="quantize with int8 and zero point 0")
    if status or not log.passed or not (folder / FILE).is_file() or not (folder / program.LAYERS).is_file():
        raise refused("trtexec cannot build the engine", log.refusals(status), hint=log.hint(status))
    return log


def _machine(here: Log) -> dict[str, str]:
    """What this machine has, TensorRT as trtexec tells it: without its build before 10.4."""
    return machine_of(here.version, here.gpu, here.sm)


def _timing_cache(here: Log, folder: Path | None) -> Path | None:
    """One file per version, compute capability and GPU, as they share no times; none where none can be written."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return cache_path(folder.absolute(), here.version, here.sm or "", here.gpu or "")


def _ports(tensors: Sequence[GraphTensor], known: Collection[str]) -> list[dict[str, Any]]:
    for tensor in tensors:
        if tensor.dtype not in known:
            raise StageError(
                f"tensor {tensor.name!r} is {tensor.dtype}, which does not pass through trtexec's files",
                hint="cast it inside the graph",
            )
        if re.search(r"[,'\"*]", tensor.name):
            raise StageError(f"tensor {tensor.name!r} has a name that trtexec cannot be told", hint="rename it")
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": [size if isinstance(size, int) else -1 for size in tensor.shape],
        }
        for tensor in tensors
    ]


def _shapes(inputs: Sequence[GraphTensor], profiles: Mapping[str, Sequence[int]]) -> dict[str, list[tuple[int, ...]]]:
    """Least, usual and largest shape of every input with dynamic dimensions, by their names in the graph.

    Raises InputError for a dimension without a profile and for a profile of no dimension.
    """
    dynamic = {size: tensor.name for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    for dimension, name in dynamic.items():
        if dimension not in profiles:
            raise InputError(
                f"dimension {dimension!r} of input {name!r} is dynamic and has no profile",
                hint=f"engine.tensorrt.profiles: {{{dimension or 'NAME'}: [1, 1, 8]}} (least, usual and largest size)",
            )
    if unknown := sorted(set(profiles) - set(dynamic)):
        raise InputError(
            f"profile {unknown[0]!r} is of no dynamic dimension of the graph",
            hint=f"it has {', '.join(sorted(dynamic)) or 'none'}",
        )
    return {
        tensor.name: [
            tuple(profiles[size][bound] if isinstance(size, str) else size for size in tensor.shape)
            for bound in range(3)
        ]
        for tensor in inputs
        if any(isinstance(size, str) for size in tensor.shape)
    }


def _array(port: Port, dimensions: str, values: str) -> np.ndarray:
    """An output as trtexec wrote it. Raises ValueError for what is no such array."""
    shape = tuple(int(size) for size in dimensions.split("x") if size)
    if tuple(-1 if wanted == -1 else size for size, wanted in zip(shape, port.shape, strict=True)) != port.shape:
        raise ValueError(f"{port.name!r} has shape {shape}, not {port.shape}")
    number = float if port.dtype.startswith("float") else int
    return np.array([number(text) for text in values.replace(",", " ").split()], dtype=port.dtype).reshape(shape)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot be written: {error.strerror}", where=str(path.parent), hint="set TMPDIR to a folder with room"
        ) from error
