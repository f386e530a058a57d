"""Components of LeRobot's policies become ONNX graphs that give what LeRobot gave, at every step of its loop."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.unit.policies.lerobot.conftest import KINDS
from vlaopt import backends
from vlaopt.backends import EngineOptions
from vlaopt.graph import check
from vlaopt.graph.torch_export import export_component
from vlaopt.policies import EagerPolicy
from vlaopt.policies.lerobot.flow import TimeEmbedding
from vlaopt.runtime.loop import draw_noise
from vlaopt.tensors import Array

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")


DOUBLE = onnx.TensorProto.DOUBLE


@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_compute_what_lerobot_computes(kind: str, eagers: dict[str, EagerPolicy]) -> None:
    eager = eagers[kind]
    calls: dict[str, list[tuple[dict[str, Array], dict[str, Array]]]] = {}
    for seed, observation in enumerate(lerobot.observations(kind, 2, seed=8)):
        noise = draw_noise(eager.spec, np.random.default_rng(seed))
        eager.predict_chunk(observation, noise, tap=lambda name, *halves: calls.setdefault(name, []).append(halves))
    for name, module in eager.components().items():
        first = {key: torch.from_numpy(value) for key, value in calls[name][0][0].items()}
        graph = export_component(module, first, list(calls[name][0][1]), opset=20)
        check.load(graph)
        session = onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
        assert [port.name for port in session.get_inputs()] == list(first)
        for inputs, outputs in calls[name]:
            for key, value in zip(outputs, session.run(None, inputs), strict=True):
                np.testing.assert_allclose(value, outputs[key], rtol=0, atol=5e-5, err_msg=f"{key} of {name}")


@pytest.mark.parametrize(("width", "shortest", "longest"), [(24, 4e-3, 4.0), (720, 4e-3, 4.0), (64, 1e-3, 2.0)])
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
def test_the_embedding_of_time_is_that_of_lerobot_on_every_backend(
    width: int, shortest: float, longest: float, backend: str
) -> None:
    from lerobot.policies.smolvla.modeling_smolvla import create_sinusoidal_pos_embedding

    embed = TimeEmbedding(width, shortest, longest)
    times = torch.cat([torch.linspace(0, 1, 11), torch.rand(100, generator=torch.Generator().manual_seed(0))])
    theirs = create_sinusoidal_pos_embedding(times, width, shortest, longest, torch.device("cpu"))
    if backend == "eager":
        ours = embed(times)
    else:
        library, options = backends.get(backend), EngineOptions(threads=1)
        if library.missing():
            pytest.skip(str(library.missing()))

        class Module(torch.nn.Module):
            def forward(self, time: torch.Tensor) -> torch.Tensor:
                return embed(time)

        graph = export_component(Module(), {"time": times[:1]}, ["embedding"], opset=20)
        session = library.open(library.build(graph, options).files, options)
        ours = torch.cat([torch.from_numpy(session.run({"time": one[None].numpy()})["embedding"]) for one in times])
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=5e-7)


def test_no_component_calculates_in_float64(eagers: dict[str, EagerPolicy]) -> None:
    eager = eagers["smolvla"]
    calls: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
    eager.predict_chunk(
        lerobot.observations("smolvla", 1)[0], tap=lambda name, *halves: calls.setdefault(name, halves) and None
    )
    for name, module in eager.components().items():
        first = {key: torch.from_numpy(value) for key, value in calls[name][0].items()}
        model = check.load(export_component(module, first, list(calls[name][1]), opset=20))
        inferred = onnx.shape_inference.infer_shapes(model)
        doubles = [value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == DOUBLE]
        assert doubles == []


def test_nodes_are_named_by_the_paths_of_the_network(eagers: dict[str, EagerPolicy]) -> None:
    eager = eagers["smolvla"]
    calls: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
    eager.predict_chunk(
        lerobot.observations("smolvla", 1)[0], tap=lambda name, *halves: calls.setdefault(name, halves) and None
    )
    inputs = {key: torch.from_numpy(value) for key, value in calls["prefix"][0].items()}
    graph = export_component(eager.components()["prefix"], inputs, list(calls["prefix"][1]), opset=20)
    modules = dict(eager.module.named_modules())
    scopes = {node.name.rpartition("/")[0] for node in check.load(graph).graph.node if "/" in node.name}
    assert "model.vlm_with_expert.vlm.model.text_model.layers.3.self_attn.k_proj" in scopes
    assert scopes <= set(modules)
