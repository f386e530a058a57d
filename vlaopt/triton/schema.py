"""Model configurations by Triton's own Protocol Buffers schema, and its rules for ensembles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlaopt.artifact.manifest import EngineEntry
from vlaopt.artifact.policy_spec import TensorSpec
from vlaopt.errors import EnvironmentProblem, StageError
from vlaopt.optional import require
from vlaopt.triton.models import DATATYPES, Model, Pipeline, dims

Config = Any
"""`inference.ModelConfig` of Triton's model_config.proto."""


def schema() -> Any:
    """Triton's messages, as its client ships them. Raises EnvironmentProblem when they are not installed."""
    try:
        return require("tritonclient.grpc.model_config_pb2", "triton")
    except RuntimeError as error:  # what tritonclient raises where grpcio is missing
        raise EnvironmentProblem(
            f"tritonclient.grpc cannot be imported: {error}", hint="pip install 'vlaopt[triton]'"
        ) from error


def component_config(model: Model, engine: EngineEntry) -> Config:
    """The configuration of a component: one instance, no batching, the threads it was built for."""
    messages = schema()
    config = messages.ModelConfig(name=model.name, backend=model.server.backend, max_batch_size=0)
    _add_tensors(config, model.inputs, model.outputs)
    kind = messages.ModelInstanceGroup.Kind.Value(model.server.processor)
    config.instance_group.add(count=1, kind=kind)
    for key, value in _parameters(model, engine).items():
        config.parameters[key].string_value = value
    if model.server.accelerator:
        config.optimization.execution_accelerators.gpu_execution_accelerator.add(name=model.server.accelerator)
    return config


def ensemble_config(whole: Pipeline) -> Config:
    """The configuration of an ensemble; tensors of the models meet by name, as in the policy."""
    config = schema().ModelConfig(name=whole.name, platform="ensemble", max_batch_size=0)
    _add_tensors(config, whole.inputs, whole.outputs)
    for model in whole.models:
        step = config.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
        step.input_map.update({tensor.name: tensor.name for tensor in model.inputs})
        step.output_map.update({name: name for name in whole.used(model)})
    return config


def check_ensemble(config: Config, models: Mapping[str, Config]) -> None:
    """Raise StageError unless Triton will take the ensemble of these models.

    Its rules (`ValidateEnsembleSchedulingConfig` and `ensemble_utils.cc` of Triton's core): every input of a model is
    mapped, and to a tensor of its datatype and shape; each tensor is given once and taken; no step waits for itself.
    """
    tensors = {tensor.name: _form(tensor) for tensor in config.input}
    waiting, taken = list(config.ensemble_scheduling.step), {tensor.name for tensor in config.output}
    for step in waiting:
        model = models.get(step.model_name)
        if model is None:
            raise StageError(f"ensemble {config.name}: there is no model {step.model_name!r}")
        for mapped, ports, what in ((step.input_map, model.input, "input"), (step.output_map, model.output, "output")):
            unknown = set(mapped) - {port.name for port in ports}
            if unknown or not mapped:
                raise StageError(
                    f"ensemble {config.name}: {step.model_name} has no {what} {min(unknown, default='')!r}"
                )
        if lost := {port.name for port in model.input} - set(step.input_map):
            raise StageError(f"ensemble {config.name}: input {min(lost)!r} of {step.model_name} is not mapped")
        taken |= set(step.input_map.values())
    while ready := [step for step in waiting if set(step.input_map.values()) <= set(tensors)]:
        for step in ready:
            _run_step(config.name, step, models[step.model_name], tensors)
        waiting = [step for step in waiting if step not in ready]
    if waiting:
        lost = set(waiting[0].input_map.values()) - set(tensors)
        raise StageError(
            f"ensemble {config.name}: {waiting[0].model_name} waits for {min(lost)!r}, which nothing gives"
        )
    for tensor in config.output:
        if tensors.get(tensor.name) != _form(tensor):
            raise StageError(f"ensemble {config.name}: output {tensor.name!r} is not given, or in another form")
    if unused := set(tensors) - taken:
        raise StageError(f"ensemble {config.name}: nothing takes {min(unused)!r}")


def text(config: Config, about: str) -> bytes:
    """The file config.pbtxt, with a first line that says what it is of."""
    from google.protobuf import text_format

    return (
        f"# {about}. Batching is off: tensors have their whole shape.\n{text_format.MessageToString(config)}".encode()
    )


def _run_step(ensemble: str, step: Any, model: Config, tensors: dict[str, tuple[int, tuple[int, ...]]]) -> None:
    ports = {port.name: _form(port) for port in (*model.input, *model.output)}
    for name, tensor in step.input_map.items():
        if tensors[tensor] != ports[name]:
            raise StageError(f"ensemble {ensemble}: {name!r} of {step.model_name} has another form than {tensor!r}")
    for name, tensor in step.output_map.items():
        if tensor in tensors:
            raise StageError(f"ensemble {ensemble}: {tensor!r} is given twice")
        tensors[tensor] = ports[name]


def _form(tensor: Any) -> tuple[int, tuple[int, ...]]:
    return tensor.data_type, tuple(tensor.dims)


def _add_tensors(config: Config, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    datatypes = schema().DataType
    for place, tensors in ((config.input, inputs), (config.output, outputs)):
        for tensor in tensors:
            place.add(name=tensor.name, data_type=datatypes.Value(DATATYPES[tensor.dtype]), dims=dims(tensor))


def _parameters(model: Model, engine: EngineEntry) -> dict[str, str]:
    """The keys of Triton's backends: github.com/triton-inference-server/{onnxruntime,openvino}_backend, README.md."""
    if model.server.processor == "KIND_GPU":
        return {}
    threads = str(engine.threads)
    if model.server.backend == "onnxruntime":
        return {"intra_op_thread_count": threads} if engine.threads else {}
    found = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if engine.threads else {})
    computes_in = engine.components[model.component].facts.get("computes_in")
    return found | ({"HINT_BF16": "YES"} if computes_in == "bf16" else {})
