"""Building a TensorRT engine of an ONNX graph: what classic TensorRT and TensorRT for RTX have in common."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, graph_on_disk
from vlaopt.backends.tensorrt import log as logs
from vlaopt.errors import EnvironmentProblem, InputError, StageError

LEVELS = range(6)
"""Of `optimization_level`: how long the builder searches."""

# What the parser logs, as a warning, before it reads uint8 as int8 and so calculates something else.
_READ_AS_INT8 = "Defaulting to INT8"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Refusal:
    """Why TensorRT does not take a graph: the node and its operator, both empty where it names none, and its reason."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"node {self.node!r} ({self.operator}): {self.reason}" if self.node else self.reason


class Refused(StageError):
    """TensorRT does not take a graph, or cannot build an engine of it; `refusals` are its reasons."""

    def __init__(self, message: str, *, hint: str | None = None, refusals: Sequence[Refusal] = ()) -> None:
        super().__init__(message, hint=hint)
        self.refusals = tuple(refusals)


def refused(message: str, refusals: Sequence[Refusal], *, hint: str | None = None) -> Refused:
    """The error whose message goes on with all of `refusals`, one at least."""
    return Refused(f"{message}: {'; '.join(map(str, refusals))}", hint=hint, refusals=refusals)


@dataclass(frozen=True, eq=False)
class Draft:
    """A parsed graph about to be built: TensorRT's builder, network and config, and the log of all three."""

    graph: Graph
    trt: Any
    builder: Any
    network: Any
    parser: Any  # must outlive the build: it holds the network's weights
    config: Any
    log: logs.Log
    title: str

    def build(self) -> bytes:
        """The serialized engine. Raises Refused with the builder's reason, which it only logs."""
        built = self.builder.build_serialized_network(self.network, self.config)
        if built is not None:
            return bytes(built)
        hint = logs.MEMORY_HINT if logs.ran_out_of_memory([*self.log.errors, *self.log.warnings]) else None
        reason = Refusal(*self._node(), logs.reason(self.log))
        raise refused(f"{self.title} cannot build the engine", [reason], hint=hint)

    def _node(self) -> tuple[str, str]:
        """The first node of the graph that the errors of the log name, and its operator."""
        told = " ".join(self.log.errors)
        found = [
            (place, -len(node.name), node) for node in self.graph.nodes() if (place := _place(told, node.name)) >= 0
        ]
        _, _, node = min(found, key=lambda entry: entry[:2], default=(0, 0, None))
        return (node.name, node.operator) if node else ("", "")


def parsed(trt: Any, title: str, graph: Graph, *, strong: bool = True) -> Draft:
    """The graph in TensorRT's hands, `strong`ly typed or not. Raises Refused with every reason of the parser."""
    log = logs.collector(trt)
    builder = _builder(trt, title, log)
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag) if strong else 0)
    parser = trt.OnnxParser(network, log)
    with graph_on_disk(graph) as path:
        taken = parser.parse_from_file(str(path))
    if not taken:
        refusals = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)]
        raise refused(f"{title} refuses the graph", refusals or [Refusal("", "", logs.reason(log))])
    if any(_READ_AS_INT8 in message for message in log.warnings):
        raise refused(
            f"{title} refuses the graph",
            [Refusal("", "", f"{title} would read this graph's uint8 quantization as int8")],
            hint="quantize with int8 and zero point 0",
        )
    return Draft(graph, trt, builder, network, parser, builder.create_builder_config(), log, title)


def configure(draft: Draft, settings: Mapping[str, Any], options: EngineOptions) -> None:
    """What every lane is told alike: how long to search, scratch memory, profiles, names of layers, who watches.

    Raises InputError for dimensions and profiles that do not fit each other.
    """
    trt, config = draft.trt, draft.config
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = settings["optimization_level"]
    if settings["workspace_mib"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mib"] << 20)
    _add_profile(draft, settings["profiles"])
    if options.advance is not None:
        config.progress_monitor = _monitor(trt, options.advance)


def platform_name() -> str:
    """The operating system and instruction set that an engine is bound to, like 'linux-aarch64'."""
    return f"{sys.platform}-{platform.machine()}"


def settings_of(options: EngineOptions, defaults: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """The settings of a build, all of them: those of `options` over the defaults. Raises InputError by name."""
    if unknown := sorted(set(options.settings) - set(defaults)):
        raise InputError(f"unknown {backend} setting {unknown[0]!r}", hint=f"settings: {', '.join(defaults)}")
    settings = {**defaults, **options.settings}
    for name, value in settings.items():
        if wanted := _wanted(name, value):
            raise InputError(f"{backend} setting {name!r} is {wanted}, not {value!r}")
    return settings


def _builder(trt: Any, title: str, log: logs.Log) -> Any:
    try:
        return trt.Builder(log)
    except TypeError as error:  # how the bindings say that the library made none: its own reason is in the log
        raise EnvironmentProblem(f"{title} gives no builder: {logs.reason(log)}") from error


def _refusal(error: Any) -> Refusal:
    text = logs.parser_meaning(error.desc())
    return Refusal(error.node_name() or (f"#{error.node()}" if error.node() >= 0 else ""), error.node_operator(), text)


def _place(text: str, name: str) -> int:
    """Where `text` names the node `name`, -1 where it does not; a plain word must be told to be one: `layer pool`."""
    told = "" if "/" in name else r"(?:\b(?:node|layer)s? |[\[{'\"`])"
    found = re.search(rf"{told}(?<![\w/])(?<!\w\.){re.escape(name)}(?![\w/])", text) if name else None
    return found.start() if found else -1


def _add_profile(draft: Draft, profiles: Mapping[str, Sequence[int]]) -> None:
    """One optimisation profile for all inputs with dynamic dimensions, by the names that these have in the graph."""
    inputs = draft.graph.inputs()
    named = {
        (tensor.name, axis): size
        for tensor in inputs
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, str)
    }
    for (tensor, axis), dimension in named.items():
        if not dimension:
            raise InputError(f"dimension {axis} of input {tensor!r} is dynamic and has no name, so no profile can be")
        if dimension not in profiles:
            raise InputError(
                f"dimension {dimension!r} of input {tensor!r} is dynamic and has no profile",
                hint=f"engine.tensorrt.profiles: {{{dimension}: [1, 1, 8]}} (least, usual and largest size)",
            )
    if unknown := sorted(set(profiles) - set(named.values())):
        known = ", ".join(sorted(set(named.values()))) or "none"
        raise InputError(f"profile {unknown[0]!r} is of no dynamic dimension of the graph", hint=f"it has {known}")
    if not named:
        return
    profile = draft.builder.create_optimization_profile()
    for port in inputs:
        if not any(isinstance(size, str) for size in port.shape):
            continue
        least, usual, largest = (
            tuple(profiles[size][bound] if isinstance(size, str) else size for size in port.shape) for bound in range(3)
        )
        profile.set_shape(port.name, least, usual, largest)
    if draft.config.add_optimization_profile(profile) < 0:
        raise InputError(f"{draft.title} refuses the profiles: {logs.reason(draft.log)}")


def _wanted(name: str, value: Any) -> str | None:
    """What a setting must be, where `value` is not; else None."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if name == "workspace_mib":
        return None if number and value >= 0 else "a number of MiB"
    if name == "optimization_level":
        return None if number and value in LEVELS else "a level from 0 to 5"
    if name == "profiles":
        wrong = not isinstance(value, Mapping) or not all(map(_in_order, value.values()))
        return "three sizes by the name of a dimension, least, usual and largest" if wrong else None
    return None if isinstance(value, bool) else "true or false"


def _in_order(sizes: Any) -> bool:
    """Whether these are the least, usual and largest size of one dimension."""
    whole = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in sizes)
    return whole and len(sizes) == 3 and list(sizes) == sorted(sizes)


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
