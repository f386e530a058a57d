"""Which of Triton's backends runs a component, from which files, under which names. Knows nothing of its schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from vlaopt.artifact.manifest import EngineEntry
from vlaopt.artifact.policy_spec import PolicySpec, SingleLoop, TensorSpec
from vlaopt.errors import InputError

VERSION = "1"
"""The one version of each model; its folder's name."""

# https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md#datatypes
DATATYPES = {
    "bool": "TYPE_BOOL",
    **{f"uint{bits}": f"TYPE_UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"int{bits}": f"TYPE_INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
}
"""Triton's name of each of numpy's dtypes."""


@dataclass(frozen=True)
class Server:
    """How Triton runs one of vlaopt's backends: its backend, its processor, and the names it knows model files by."""

    backend: str
    processor: Literal["KIND_CPU", "KIND_GPU"]
    files: Mapping[str, str]
    accelerator: str = ""
    """An execution accelerator of Triton's ONNX Runtime backend."""


_ONNX, _PLAN = {"model.onnx": "model.onnx"}, {"engine.plan": "model.plan"}
SERVERS = {
    "onnxruntime": Server("onnxruntime", "KIND_CPU", _ONNX),
    "onnxruntime-cuda": Server("onnxruntime", "KIND_GPU", _ONNX),
    "onnxruntime-tensorrt": Server("onnxruntime", "KIND_GPU", _ONNX, accelerator="tensorrt"),
    "openvino": Server("openvino", "KIND_CPU", {"model.xml": "model.xml", "model.bin": "model.bin"}),
    "tensorrt": Server("tensorrt", "KIND_GPU", _PLAN),
    "trtexec": Server("tensorrt", "KIND_GPU", _PLAN),
}


@dataclass(frozen=True)
class Model:
    """A component as a model of the repository; `files` from the artifact's paths to the names in its version's folder.

    `shapes` of `inputs` and `outputs` have no batch dimension of Triton's: batching is off.
    """

    name: str
    component: str
    server: Server
    files: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Pipeline:
    """The ensemble of a policy whose components run once, in order; `inputs` come from the client."""

    name: str
    models: tuple[Model, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def used(self, model: Model) -> list[str]:
        """The outputs of `model` that others or the client take: Triton refuses an ensemble that names more."""
        taken = {tensor.name for other in self.models for tensor in other.inputs}
        taken |= {tensor.name for tensor in self.outputs}
        return [tensor.name for tensor in model.outputs if tensor.name in taken]


def models_of(policy: str, spec: PolicySpec, engine: EngineEntry) -> dict[str, Model]:
    """The model of every component, in the order they run.

    Raises InputError for an engine that Triton has no backend for, and for tensors that it has no form for.
    """
    if engine.backend not in SERVERS:
        raise InputError(
            f"Triton has no backend for engines of {engine.backend}",
            hint=f"export an artifact built for one of: {', '.join(SERVERS)}",
        )
    if engine.backend == "openvino" and "fp16" in computing_in(engine):
        raise InputError("Triton's OpenVINO backend cannot be told to compute in FP16", hint="build for onnxruntime")
    server = SERVERS[engine.backend]
    models: dict[str, Model] = {}
    for name in spec.order():
        component = spec.components[name]
        for tensor in (*component.inputs, *component.outputs):
            _check_tensor(name, tensor)
        files = _files(name, engine.components[name].files, server)
        models[name] = Model(model_name(policy, name), name, server, files, component.inputs, component.outputs)
    named = [model.name.casefold() for model in models.values()]
    if twice := [name for name in named if named.count(name) > 1]:
        raise InputError(f"two components would be called {twice[0]!r} in Triton", hint="rename one of them")
    return models


def model_name(policy: str, component: str = "") -> str:
    """The name of a component's model, or of the whole policy's: without what a path or an address would split at.

    Triton refuses '/' and '..' (`ValidateModelName` of its core); a name is a part of addresses too.
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{policy}_{component}" if component else policy)


def pipeline(policy: str, spec: PolicySpec, models: Mapping[str, Model]) -> Pipeline | None:
    """The ensemble of a policy whose components run once; None for a policy with a loop, which Triton has no form for.

    Components whose outputs nothing takes are left out. Raises InputError when nothing would be left.
    """
    if not isinstance(spec.loop, SingleLoop):
        return None
    wanted = {spec.postprocess.input}
    needed: list[Model] = []
    for name in reversed(spec.order()):
        model = models[name]
        if wanted & {tensor.name for tensor in model.outputs}:
            needed.insert(0, model)
            wanted |= {tensor.name for tensor in model.inputs}
    given = {tensor.name for model in needed for tensor in model.outputs}
    inputs = {tensor.name: tensor for model in needed for tensor in model.inputs if tensor.name not in given}
    outputs = tuple(tensor for model in needed for tensor in model.outputs if tensor.name == spec.postprocess.input)
    if not outputs:
        raise InputError(f"no component gives {spec.postprocess.input!r}, which the actions are made from")
    return Pipeline(model_name(policy), tuple(needed), tuple(inputs.values()), outputs)


def dims(tensor: TensorSpec) -> list[int]:
    """The shape in Triton's form: −1 for a dynamic dimension."""
    return [size if isinstance(size, int) else -1 for size in tensor.shape]


def _files(component: str, paths: tuple[str, ...], server: Server) -> dict[str, str]:
    """Where each of an engine's files goes; what a graph points into keeps its name, so that it is found."""
    names = {path: PurePosixPath(path).name for path in paths}
    if lost := set(server.files) - set(names.values()):
        raise InputError(f"the engine of component {component!r} has no {min(lost)}")
    return {path: server.files.get(name, name) for path, name in names.items()}


def _check_tensor(component: str, tensor: TensorSpec) -> None:
    if tensor.dtype not in DATATYPES:
        raise InputError(f"{component}: Triton has no datatype for {tensor.name!r}, which is {tensor.dtype}")
    if not tensor.shape:
        raise InputError(
            f"{component}: {tensor.name!r} is a single number without a dimension, which Triton does not take",
            hint="give it the shape [1] where the policy is exported",
        )


def computing_in(engine: EngineEntry) -> set[str]:
    """What components of an OpenVINO engine compute in where they are not quantized."""
    return {component.facts.get("computes_in", "fp32") for component in engine.components.values()}
