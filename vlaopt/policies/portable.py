"""From an eager policy to portable graphs: export each component, compare it with what was captured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, Session
from vlaopt.graph.torch_export import export_component
from vlaopt.memory import give_back
from vlaopt.policies import EagerPolicy
from vlaopt.policies.capturing import Captured, difference
from vlaopt.progress import Progress, track
from vlaopt.runtime.capture import Capture
from vlaopt.tensors import Array

Inputs = dict[str, dict[str, torch.Tensor]]
"""Of every component, its inputs by name in the spec's order."""


def first_inputs(capture: Capture, position: int, processed: Mapping[str, Array]) -> Inputs:
    """The inputs of every component's first call for one captured sample; `processed` is what its processors gave."""
    found: Inputs = {}
    for name in capture.spec.order():
        first = capture.calls(position, name, processed)[0]
        # Made anew here, because a tensor of inference mode can be neither traced nor trained on.
        found[name] = {key: torch.from_numpy(value.copy()) for key, value in first.inputs.items()}
    return found


def export_components(
    eager: EagerPolicy, inputs: Inputs, write: Callable[[str, Graph], None], *, opset: int, progress: Progress
) -> int:
    """Every component as an FP32 ONNX graph to `write(component, graph)`, one at a time; the bytes in all."""
    modules = dict(eager.components())
    size = 0
    for name in track(progress, "exporting components", eager.spec.order(), len(modules)):
        outputs = [tensor.name for tensor in eager.spec.components[name].outputs]
        graph = export_component(modules.pop(name), inputs[name], outputs, opset=opset, name=name)
        write(name, graph)
        size += graph.size
        del graph
        give_back()  # torch's programs hold each other in circles, and each of them the weights
    return size


def open_graph(graph: Graph) -> Session:
    """A component's graph on ONNX Runtime."""
    return backends.get("onnxruntime").open(graph.files("model.onnx"), EngineOptions())


def open_compared(
    capture: Capture, captured: Captured, read: Callable[[str], Graph], progress: Progress
) -> tuple[dict[str, Session], dict[str, float]]:
    """Every component's graph opened, `read(component)` giving it, and how far it is from what was captured at most.

    Each runs on the inputs that the eager policy's component had in every call on the golden observations; see
    `difference` for its unit.
    """
    sessions: dict[str, Session] = {}
    differences: dict[str, float] = {}
    order = capture.spec.order()
    for name in track(progress, "comparing components with eager", order, len(order)):
        sessions[name] = open_graph(read(name))
        give_back()  # ONNX Runtime packs weights anew, piece by piece
        differences[name] = 0.0
        for position, processed in zip(capture.index.golden, captured.inputs, strict=True):
            for call in capture.calls(position, name, processed):
                outputs = sessions[name].run(call.inputs)
                worst = max(difference(outputs[key], value) for key, value in call.outputs.items())
                differences[name] = max(differences[name], worst)
    return sessions, differences
