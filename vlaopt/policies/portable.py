"""From an eager policy to portable graphs: record what every component sees, export each, compare with eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vlaopt import backends
from vlaopt.backends import EngineOptions
from vlaopt.errors import StageError
from vlaopt.graph.torch_export import export_component
from vlaopt.policies import EagerPolicy
from vlaopt.progress import Progress, track
from vlaopt.runtime.policy import Policy
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array


@dataclass(frozen=True)
class Recording:
    """What one component got and gave in one eager pass, tensors by name in the spec's order."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def difference(self, outputs: Mapping[str, Array]) -> float:
        """Largest absolute difference between these outputs and `outputs`."""
        pairs = ((outputs[name].astype(np.float64), value.numpy()) for name, value in self.outputs.items())
        return float(max(np.abs(mine - theirs).max() for mine, theirs in pairs))


def record(eager: EagerPolicy, observation: Mapping[str, Any], noise: Array | None) -> dict[str, Recording]:
    """The first call of every component while the eager policy predicts on `observation`.

    Raises StageError when a component is not called, or gives a shape other than its spec says.
    """
    seen: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
    handles = []
    for name, module in eager.components().items():
        component = eager.spec.components[name]

        def hook(
            _: nn.Module, given: tuple[Any, ...], result: Any, name: str = name, component: Any = component
        ) -> None:
            results = result if isinstance(result, tuple) else (result,)
            inputs = {tensor.name: value.numpy().copy() for tensor, value in zip(component.inputs, given, strict=True)}
            outputs = {
                tensor.name: value.numpy().copy() for tensor, value in zip(component.outputs, results, strict=True)
            }
            seen.setdefault(name, (inputs, outputs))

        handles.append(module.register_forward_hook(hook))
    try:
        eager.predict_chunk(observation, noise)
    finally:
        for handle in handles:
            handle.remove()
    recordings = {}
    for name, component in eager.spec.components.items():
        if name not in seen:
            raise StageError(f"component {name} was not called by the eager policy")
        arrays = {**seen[name][0], **seen[name][1]}
        for tensor in (*component.inputs, *component.outputs):
            if arrays[tensor.name].shape != tensor.shape:
                shape = list(arrays[tensor.name].shape)
                raise StageError(
                    f"component {name}: {tensor.name} has shape {shape}, its spec says {list(tensor.shape)}"
                )
        # Made anew here, because a tensor of inference mode can be neither traced nor trained on.
        inputs, outputs = ({key: torch.from_numpy(value) for key, value in half.items()} for half in seen[name])
        recordings[name] = Recording(inputs, outputs)
    return recordings


def export_components(
    eager: EagerPolicy, recordings: Mapping[str, Recording], *, opset: int, progress: Progress
) -> dict[str, bytes]:
    """Every component as a serialised FP32 ONNX graph, in the spec's order."""
    modules = eager.components()
    graphs: dict[str, bytes] = {}
    for name in track(progress, "exporting components", eager.spec.order(), len(modules)):
        names = [tensor.name for tensor in eager.spec.components[name].outputs]
        model = export_component(modules[name], recordings[name].inputs, names, opset=opset)
        graphs[name] = model.SerializeToString(deterministic=True)
    return graphs


def open_portable(
    eager: EagerPolicy, graphs: Mapping[str, bytes], recordings: Mapping[str, Recording]
) -> tuple[Policy, dict[str, float]]:
    """The policy over its exported graphs on ONNX Runtime, and how far each component is from eager at most."""
    library, options = backends.get("onnxruntime"), EngineOptions()
    sessions = {name: library.open(library.build(graph, options).files, options) for name, graph in graphs.items()}
    differences = {}
    for name, recording in recordings.items():
        outputs = sessions[name].run({key: value.numpy() for key, value in recording.inputs.items()})
        differences[name] = recording.difference(outputs)
    assets = eager.assets()
    processors = Processors(eager.spec, assets.__getitem__)
    return Policy(eager.spec, processors, sessions, backend="onnxruntime"), differences
