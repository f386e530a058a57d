"""An exported component computes what the module does, says where each node came from, and is the same every time."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx.reference
import pytest
import torch
from torch import Tensor, nn

from vlaopt.errors import StageError
from vlaopt.graph import external
from vlaopt.graph.check import load
from vlaopt.graph.topology import opset_of, scope_of
from vlaopt.graph.torch_export import export_component


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Hardswish())
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.drop(self.conv(image)).flatten(2).transpose(1, 2)) * 2.0
        return self.lstm(x)[0], x.mean(1) + state


def module() -> Block:
    torch.manual_seed(0)
    return Block()


INPUTS = {"image": torch.rand(1, 3, 4, 4), "robot state/π": torch.rand(1, 4)}
OUTPUTS = ["features", "mean out"]


def test_the_graph_computes_what_the_module_does() -> None:
    block = module()
    model = load(export_component(block, INPUTS, OUTPUTS, opset=20))
    got = onnx.reference.ReferenceEvaluator(model).run(OUTPUTS, {name: value.numpy() for name, value in INPUTS.items()})
    expected = block.eval()(*INPUTS.values())
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)


def test_inputs_and_outputs_have_the_names_and_static_shapes_given() -> None:
    model = load(export_component(module(), INPUTS, OUTPUTS, opset=20))
    assert [value.name for value in model.graph.input] == list(INPUTS)
    assert [value.name for value in model.graph.output] == OUTPUTS
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 4, 4]


def test_nodes_are_named_after_their_module_and_layer_norm_stays_whole() -> None:
    nodes = load(export_component(module(), INPUTS, OUTPUTS, opset=20)).graph.node
    scopes = {node.op_type: scope_of(node.name) for node in nodes}
    assert scopes["Conv"] == "conv.0"
    assert scopes["HardSwish"] == "conv.2"
    assert scopes["LayerNormalization"] == "norm"
    assert scopes["LSTM"] == "lstm"
    assert scopes["Add"] == ""
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_the_opset_is_the_one_asked_for(opset: int) -> None:
    graph = export_component(nn.Linear(2, 2), {"x": torch.zeros(1, 2)}, ["y"], opset=opset)
    assert opset_of(load(graph)) == opset


def test_an_opset_that_the_exporter_does_not_write_is_an_error() -> None:
    with pytest.raises(StageError, match=r"opset"):
        export_component(nn.Linear(2, 2), {"x": torch.zeros(1, 2)}, ["y"], opset=16)


def test_two_processes_write_equal_bytes() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + (
        "import hashlib; from test_torch_export import *\n"
        "data = export_component(module(), INPUTS, OUTPUTS, opset=20).model\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "3"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    ours = export_component(module(), INPUTS, OUTPUTS, opset=20).model
    assert other.stdout == hashlib.sha256(ours).hexdigest() + "\n"
    assert other.stderr == ""


class Alike(nn.Module):
    """Three products with equal weights, of which two share a parameter or all have their own; and a fourth."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.third, self.own = (nn.Linear(256, 256, bias=False) for _ in range(4))
        if tied:
            self.second = self.third = self.first
        self.second.load_state_dict(self.first.state_dict())
        self.third.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.third(self.second(self.first(x))))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "copies"])
@pytest.mark.parametrize("smallest", [1024, 1 << 30], ids=["set aside", "in the program"])
def test_equal_weights_are_stored_once(smallest: int, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "SMALLEST", smallest)
    torch.manual_seed(0)
    alike, x = Alike(tied=tied), torch.rand(1, 2, 256)
    graph = export_component(alike, {"x": x}, ["y"], opset=20)
    model = load(graph)
    assert [tuple(tensor.dims) for tensor in model.graph.initializer] == [(256, 256), (256, 256)]
    assert 2 * 256 * 256 * 4 < graph.size < 2 * 256 * 256 * 4 + 4000
    assert len([node for node in model.graph.node if node.op_type == "MatMul"]) == 4
    got = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, alike(x).detach().numpy(), atol=1e-5)


def test_weights_above_the_limit_are_written_beside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    block = module()
    within = export_component(block, INPUTS, OUTPUTS, opset=20)
    for name in ("LIMIT", "SMALLEST"):
        monkeypatch.setattr(external, name, 64)
    outside = export_component(block, INPUTS, OUTPUTS, opset=20, name="vision")
    assert outside.data_name == "vision.onnx.data"
    assert len(outside.data) > 64
    weights = [
        {t.name: external.array(t, graph.data) for t in load(graph).graph.initializer} for graph in (within, outside)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])


class Halved(nn.Module):
    """Slices, as rotary embeddings have them, and a weight that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., 7:], x[..., :7]], dim=-1)


def test_an_exported_module_is_let_go() -> None:
    linear = nn.Sequential(nn.Linear(64, 64), Halved(), nn.LayerNorm(64), nn.Linear(64, 64))
    export_component(linear, {"x": torch.rand(1, 2, 64)}, ["y"], opset=20)
    weights = [weakref.ref(parameter) for parameter in linear.parameters()]
    del linear
    gc.collect()
    assert [weight for weight in weights if weight() is not None] == []


def test_the_exporter_says_nothing_on_its_own(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.weight.split(2)
            return x * first + second

    export_component(Halves(), {"x": torch.rand(1, 2)}, ["y"], opset=20)
    assert [record.message for record in caplog.records if record.levelno >= 30] == []
    assert capfd.readouterr() == ("", "")


def test_the_module_keeps_its_mode() -> None:
    block = module()
    block.norm.eval()
    export_component(block, INPUTS, OUTPUTS, opset=20)
    assert block.training
    assert block.conv.training
    assert not block.norm.training
    block(*INPUTS.values())


def test_a_module_that_cannot_be_traced_is_an_error_with_the_reason() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(StageError, match=r"torch cannot export Branch: .*data-dependent") as caught:
        export_component(Branch(), {"x": torch.zeros(1, 2)}, ["y"], opset=20)
    assert "\n" not in caught.value.message
