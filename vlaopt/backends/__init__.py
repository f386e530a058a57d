"""Backends: the libraries that compile and run one component. Each module drives one library and knows no other.

Every backend module offers a `BACKEND` that keeps to `Backend`; `get` finds it by name, and a third party adds one
by the entry point group `vlaopt.backends`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vlaopt.artifact.graph import Graph
from vlaopt.errors import EnvironmentProblem, InputError

BUILT_IN = {
    "onnxruntime": "vlaopt.backends.onnxruntime",
    "onnxruntime-cuda": "vlaopt.backends.onnxruntime.gpu:CUDA_BACKEND",
    "onnxruntime-tensorrt": "vlaopt.backends.onnxruntime.gpu:TENSORRT_BACKEND",
    "openvino": "vlaopt.backends.openvino",
    "reference": "vlaopt.backends.reference",
    "tensorrt": "vlaopt.backends.tensorrt.classic",
    "tensorrt-rtx": "vlaopt.backends.tensorrt.rtx",
    "trtexec": "vlaopt.backends.tensorrt.trtexec",
}
LIBRARIES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime",
    "onnxruntime-tensorrt": "onnxruntime",
    "openvino": "openvino",
    "reference": "onnx.reference",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx_bindings",
}
"""The module that a backend imports when it first opens an engine, for those who tell that time from opening's."""

Placement = Literal["onnxruntime", "openvino", "tensorrt"]
"""Where a kind of backend wants Q/DQ nodes, and of which form: see `vlaopt.quantization.placement`."""

ONE_OF = " | "
"""Between the values of a need that any of them meets."""


@dataclass(frozen=True)
class Port:
    """One input or output of a component: name, numpy dtype name, shape with -1 for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Resident:
    """An output that stays in the memory of its backend. Sessions of that backend take it where they take an array.

    It holds until the session that gave it runs again; that run may still take it. `value` is the backend's own.
    """

    backend: str
    dtype: str
    shape: tuple[int, ...]
    value: Any


Value = np.ndarray | Resident


def check_feeds(inputs: Sequence[Port], feeds: Mapping[str, Value], backend: str = "") -> None:
    """Raise InputError, by name, unless `feeds` holds exactly `inputs`, each of its port's dtype and shape.

    Tensors that stay in `backend` are taken like arrays, those of another backend refused.
    """
    if len(feeds) != len(inputs) or any(port.name not in feeds for port in inputs):
        _refuse_names(inputs, feeds)
    for port in inputs:
        value = feeds[port.name]
        if isinstance(value, Resident):
            if value.backend != backend:
                raise InputError(f"input {port.name!r} stays in the memory of {value.backend}, which is not read here")
        elif not isinstance(value, np.ndarray):
            raise InputError(f"input {port.name!r} is a {type(value).__name__}, not a numpy array")
        if value.dtype != port.dtype:
            raise InputError(f"input {port.name!r} has dtype {value.dtype}, not {port.dtype}")
        if value.shape != port.shape and not _fits(value.shape, port.shape):
            raise InputError(f"input {port.name!r} has shape {value.shape}, not {port.shape}")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, for libraries that write only to paths. Raises EnvironmentProblem when none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="vlaopt-")
    except OSError as error:
        raise EnvironmentProblem(f"no temporary folder can be made: {error}", hint="set TMPDIR") from error
    with folder as path:
        yield Path(path)


def graph_of(files: Mapping[str, bytes], name: str, backend: str) -> Graph:
    """The graph that an engine's files are: `name`, and the one beside it that it points into. Raises InputError."""
    beside = sorted(set(files) - {name})
    if name not in files or len(beside) > 1:
        found = ", ".join(sorted(files)) or "none"
        raise InputError(f"the {backend} engine is {name} and at most one file beside it, not {found}")
    return Graph(files[name], files[beside[0]], beside[0]) if beside else Graph(files[name])


@contextmanager
def graph_on_disk(graph: Graph) -> Iterator[Path]:
    """The path of `graph` in a temporary folder.

    For libraries that find a graph's data only beside it: given bytes, they would look in the working directory.
    Raises EnvironmentProblem when it cannot be written.
    """
    with scratch_folder() as folder:
        for name, data in graph.files("model.onnx").items():
            try:
                (folder / name).write_bytes(data)
            except OSError as error:
                raise EnvironmentProblem(
                    f"cannot be written: {error.strerror}", where=str(folder), hint="set TMPDIR to a folder with room"
                ) from error
        yield folder / "model.onnx"


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size == wanted or (wanted == -1 and size > 0) for size, wanted in zip(shape, expected, strict=True)
    )


def _refuse_names(inputs: Sequence[Port], feeds: Mapping[str, Value]) -> None:
    known = [port.name for port in inputs]
    problems = [f"input {name!r} is missing" for name in known if name not in feeds]
    problems += [f"input {name!r} is not known" for name in feeds if name not in known]
    raise InputError("; ".join(problems), hint=f"inputs: {', '.join(known)}")


class Session(Protocol):
    """An opened, runnable component. One thread at a time; open one session per thread."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Outputs by name for `feeds` by name, dtypes and shapes as the ports say.

        They are arrays, the caller's own. Those named in `resident` may be a `Resident` instead, where that saves
        copying: the caller hands them to other sessions of the backend and does not look inside.
        """
        ...


@dataclass(frozen=True)
class Euler:
    """An euler loop over one component: at each of `times`, state ← state + dt · velocity, in float32.

    `state`, `time` and `velocity` are the names of the component's ports.
    """

    state: str
    time: str
    velocity: str
    times: tuple[float, ...]
    dt: float


@dataclass(frozen=True)
class Link:
    """One component of a chain: its session, its outputs that stay in the backend, the loop that repeats it if one."""

    name: str
    session: Session
    resident: frozenset[str] = frozenset()
    euler: Euler | None = None


@runtime_checkable
class Chaining(Protocol):
    """A session that may run a whole chain of its kind at once: nothing comes to the host between its components."""

    def chain(
        self, links: tuple[Link, ...], tensors: Mapping[str, Value], noise: np.ndarray | None
    ) -> dict[str, Any] | None:
        """The outputs of `links`, run in turn, by name, as `run` gives them.

        The first link is this session's. Inputs come from the links before by their names, or from `tensors`. An euler
        loop starts from `noise`, float32, and gives its state, float32, by the name of its input. None where the
        links cannot be chained: they are then for the caller to run.
        """
        ...


@dataclass(frozen=True)
class DeviceTime:
    """What one run took by the device's own clock, in ms: computing, and copying its inputs there and outputs back.

    Copies are between host and device, and on the device those of tensors that stay there.
    """

    compute_ms: float
    copies_ms: float


@runtime_checkable
class Timing(Protocol):
    """A session whose device has a clock of its own. One that keeps none of its own, as ONNX Runtime, is not."""

    def device_times(self) -> AbstractContextManager[Sequence[DeviceTime]]:
        """What every `run` inside takes, in their order. A run outside costs nothing more, one in a chain adds nothing.

        The device waits where the host is slow to give it work, and that counts. A run inside takes the host longer:
        it is not for measuring wall time.
        """
        ...


def told(session: Session) -> tuple[str, ...]:
    """What a session says of how it ran, such as whether it did as a CUDA graph."""
    said: tuple[str, ...] = getattr(session, "told", ())
    return said


@dataclass(frozen=True)
class EngineOptions:
    """What a component is compiled for. `threads` 0 leaves the backend's default; `compute_capabilities` like '8.9'.

    `settings` are the backend's own (`Backend.settings`). `cache` is a folder of this machine's where opening may keep
    what it compiles (`vlaopt.backends.kept`) and building what it timed, or None. `advance` is told of a build's
    phases: a name, the step reached, the number of steps.
    """

    threads: int = 0
    compute_capabilities: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    advance: Callable[[str, int, int], None] | None = None


@dataclass(frozen=True)
class Engine:
    """A compiled component: its files by name, and the layers per precision that the backend says it will run.

    `precisions` and `layers` are what the audit reads. `precisions` counts, {"int8": 52, "fp32": 13}; `layers` names,
    {"project/Gemm": "int8"}, the nodes of the portable graph. They are empty when the backend cannot tell before it
    runs; `layers` also where it only counts (`vlaopt.backends.audit.by_node` helps to find the nodes behind kernels).
    `needs` is what a machine must have to load the engine, by the names of `Backend.machine`: {"tensorrt": "10.3.0.30",
    "gpu": "Orin", "sm": "8.7 | 8.9"}. `facts` is what else is known, as plain JSON values: how it is typed, bytes of
    weights and activations, reformatting layers.
    """

    files: Mapping[str, bytes]
    precisions: Mapping[str, int]
    notes: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One library that compiles and runs components. `placement` says how its graphs are quantized.

    `settings` are what `EngineOptions.settings` may hold, with their defaults. An engine that is `native` is machine
    code: it is built and tried in a process of its own first, opened only where its needs are met. Where a backend is
    not `timed`, its sessions give actions whose time says nothing of the engine's.
    """

    name: str
    placement: Placement
    settings: Mapping[str, Any]
    native: bool
    timed: bool

    def missing(self) -> str | None:
        """None when the library can be imported here, else the reason in one line."""
        ...

    def version(self) -> str:
        """The library's own version; raises EnvironmentProblem when it is not installed."""
        ...

    def runnable(self) -> str | None:
        """None when engines of this backend can run on this machine, else the reason in one line."""
        ...

    def machine(self) -> Mapping[str, str]:
        """What this machine has, by the names of `Engine.needs`; a name that is absent is not known here."""
        ...

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """Compile one ONNX graph. Raises StageError with the library's reason."""
        ...

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session from an engine's files. Raises EnvironmentProblem when this machine cannot run it."""
        ...


def placements(backends: Iterable[str]) -> list[Placement]:
    """The placements that these backends want, each once, in their order. Raises InputError for an unknown name."""
    return list(dict.fromkeys(get(name).placement for name in backends))


@dataclass(frozen=True)
class Misfit:
    """One need of an engine that a machine does not meet; `had` None where it is not known."""

    what: str
    needed: str
    had: str | None

    def __str__(self) -> str:
        return f"{self.what} {self.needed} is needed, {'not known' if self.had is None else self.had} is here"


def misfits(needs: Mapping[str, str], machine: Mapping[str, str]) -> list[Misfit]:
    """The needs (`Engine.needs`) that a machine (`Backend.machine`) does not meet."""
    return [
        Misfit(what, needed, machine.get(what))
        for what, needed in needs.items()
        if machine.get(what) not in needed.split(ONE_OF)
    ]


def names() -> list[str]:
    """All backends known here, the built-in ones first."""
    plugged = sorted(entry.name for entry in importlib.metadata.entry_points(group="vlaopt.backends"))
    return [*BUILT_IN, *(name for name in plugged if name not in BUILT_IN)]


def get(name: str) -> Backend:
    """The backend called `name`. Raises InputError for an unknown name. Does not import the library it drives."""
    if name in BUILT_IN:
        module, _, what = BUILT_IN[name].partition(":")
        backend: Backend = getattr(importlib.import_module(module), what or "BACKEND")
        return backend
    for entry in importlib.metadata.entry_points(group="vlaopt.backends"):
        if entry.name == name:
            plugged: Backend = entry.load()
            return plugged
    raise InputError(f"unknown backend {name!r}", hint=f"known backends: {', '.join(names())}")
