"""ONNX's own reference evaluator: slow, exact to the specification, for checks. Runs without compiling anything."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Placement, Port, Session, Value, check_feeds, graph_of, graph_on_disk
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.optional import installed_version, require

FILE = "model.onnx"


class ReferenceSession:
    """A component run by ONNX's reference evaluator."""

    def __init__(self, evaluator: Any, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
        self._evaluator = evaluator
        self._inputs = inputs
        self._outputs = outputs

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Outputs by name, all arrays. Raises InputError for wrong feeds and StageError when an operator fails."""
        check_feeds(self._inputs, feeds)
        names = [port.name for port in self._outputs]
        try:
            values = self._evaluator.run(names, dict(feeds))
        except Exception as error:  # operators are Python code and raise what they like
            raise StageError(f"ONNX's reference evaluator failed: {_one_line(error)}") from error
        return {name: np.array(value) for name, value in zip(names, values, strict=True)}


class ReferenceBackend:
    """Opens components with ONNX's reference evaluator. The engine is the graph itself."""

    name = "reference"
    placement: Placement = "onnxruntime"
    settings: Mapping[str, Any] = MappingProxyType({})
    native = False
    timed = True

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("onnx") else "onnx is not installed: pip install 'vlaopt[build]'"

    def version(self) -> str:
        found = installed_version("onnx")
        if found is None:
            raise EnvironmentProblem("onnx is not installed", hint="pip install 'vlaopt[build]'")
        return found

    def runnable(self) -> str | None:
        return self.missing()

    def machine(self) -> Mapping[str, str]:
        return {}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """The graph as given, once the evaluator accepts it. Raises StageError with its reason."""
        _refuse_settings(options)
        _evaluate(graph)
        return Engine(files=graph.files(FILE), precisions={}, notes=("calculates in the types that the graph names",))

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session on the evaluator. Raises InputError when the file is missing or damaged."""
        _refuse_settings(options)
        graph = graph_of(files, FILE, self.name)
        try:
            return _evaluate(graph)
        except StageError as error:
            raise InputError(error.message, where=FILE, hint="build the engine again") from error


BACKEND = ReferenceBackend()


def _refuse_settings(options: EngineOptions) -> None:
    if options.settings:
        raise InputError(f"unknown reference setting {min(options.settings)!r}", hint="the reference has no settings")


def _evaluate(graph: Graph) -> ReferenceSession:
    onnx = require("onnx", "build")
    evaluators = require("onnx.reference", "build")
    try:
        with graph_on_disk(graph) as path:
            onnx.checker.check_model(str(path))
            model = onnx.load_model(str(path))
        evaluator = evaluators.ReferenceEvaluator(model)
    except Exception as error:  # protobuf, the checker and the evaluator share no base but Exception
        raise StageError(f"ONNX refuses the graph: {_one_line(error)}") from error
    known = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_port(onnx, value) for value in model.graph.input if value.name not in known)
    return ReferenceSession(evaluator, inputs, tuple(_port(onnx, value) for value in model.graph.output))


def _port(onnx: Any, value: Any) -> Port:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type == onnx.TensorProto.STRING:
        raise StageError(f"{value.name!r} is not a tensor of numbers")
    shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return Port(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)


def _one_line(error: Exception) -> str:
    """The first line that says something, with the node it is about when one is named."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    about = [line for line in lines[1:] if line.startswith("==> Context:")]
    return " ".join([lines[0] if lines else type(error).__name__, *about[:1]])
