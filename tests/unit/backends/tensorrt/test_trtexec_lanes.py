"""trtexec on every lane of the stand-in: what is built runs and gives the graph's answers; each fault is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.standins import LANES, environment
from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions
from vlaopt.backends.tensorrt import trtexec_program
from vlaopt.backends.tensorrt.building import Refused
from vlaopt.backends.tensorrt.trtexec import BACKEND, FILE
from vlaopt.errors import StageError

Lane = Callable[..., None]
EVERY = [pytest.param(name, marks=() if name in (LANES[0], LANES[-1]) else pytest.mark.slow) for name in LANES]
"""Always the oldest and the newest; all take longer."""


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Lane:
    """Puts the stand-in of a lane on the PATH, with the machine and the faults that are asked for."""

    def switch(name: str, **wanted: Any) -> None:
        monkeypatch.undo()
        monkeypatch.delenv(trtexec_program.PROGRAM, raising=False)
        for variable, value in environment(name, **wanted).items():
            monkeypatch.setenv(variable, value)

    return switch


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_is_built_audited_and_gives_what_its_graph_gives(name, lane, quantized_graph, tmp_path) -> None:
    lane(name)
    graph = Graph(quantized_graph())
    engine = BACKEND.build(graph, EngineOptions(cache=tmp_path))
    assert engine.facts["typing"] == "strong"
    assert engine.layers == {"stem/conv": "int8", "head/fc": "int8"}
    assert engine.needs["tensorrt"].startswith(name)
    assert backends.misfits(engine.needs, BACKEND.machine()) == []
    (cache,) = tmp_path.iterdir()
    assert cache.stat().st_size > 0
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    given = BACKEND.open(engine.files, EngineOptions()).run({"image": image})["features"]
    cpu = backends.get("onnxruntime")
    expected = cpu.open(cpu.build(graph, EngineOptions()).files, EngineOptions()).run({"image": image})["features"]
    np.testing.assert_allclose(given, expected, atol=0.02)


def test_dynamic_dimensions_take_what_their_profile_spans(lane) -> None:
    lane("10.16")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="relu")], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    settings = {"profiles": {"batch": (1, 2, 8)}, "version_compatible": True}
    engine = BACKEND.build(Graph(model.SerializeToString()), EngineOptions(settings=settings))
    session = BACKEND.open(engine.files, EngineOptions())
    x = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(session.run({"x": x})["y"], np.maximum(x, 0))
    with pytest.raises(StageError, match=r"shape \(9, 4\) of 'x' does not satisfy"):
        session.run({"x": np.zeros((9, 4), np.float32)})


def test_what_10_3_refuses_strongly_typed_is_built_weakly(lane, quantized_graph) -> None:
    lane("10.3", faults=["strong-refused"])
    engine = BACKEND.build(Graph(quantized_graph()), EngineOptions())
    assert engine.facts["typing"] == "weak"
    assert engine.layers == {"stem/conv": "int8", "head/fc": "int8"}
    assert engine.notes[0].startswith("weakly typed: strongly typed, ")


@pytest.mark.parametrize(
    ("fault", "told", "hint"),
    [
        ("build-none", "trtexec cannot build the engine: ", False),
        ("out-of-memory", "memory", True),
        ("builder-killed", "the system ended trtexec (SIGKILL)", True),
        ("builder-segfaults", "trtexec crashed (SIGSEGV)", False),
    ],
)
def test_a_builder_that_fails_is_told(fault, told, hint, lane, graphs) -> None:
    lane("10.13", faults=[fault])
    with pytest.raises(Refused) as caught:
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())
    assert told in caught.value.message
    assert "it says nothing" not in caught.value.message
    assert (caught.value.hint is not None) == hint


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(lane, one_node) -> None:
    lane("10.16")
    with pytest.raises(Refused) as caught:
        BACKEND.build(Graph(one_node("Mystery", domain="maker.example")), EngineOptions())
    assert (caught.value.refusals[0].node, caught.value.refusals[0].operator) == ("my/node 1", "Mystery")


def test_a_plan_of_another_lane_does_not_run(lane, graphs) -> None:
    lane("10.13")
    files = BACKEND.build(Graph(graphs["conv"]), EngineOptions()).files
    needs = dict(BACKEND.machine())
    lane("10.16")
    assert [misfit.what for misfit in backends.misfits(needs, BACKEND.machine())] == ["tensorrt"]
    session = BACKEND.open(files, EngineOptions())
    with pytest.raises(StageError, match="trtexec cannot run the plan: "):
        session.run({"image": np.zeros((1, 3, 16, 16), np.float32)})


def test_a_plan_whose_run_fails_is_told(lane, graphs) -> None:
    lane("11.4")
    files = BACKEND.build(Graph(graphs["conv"]), EngineOptions()).files
    assert FILE in files
    lane("11.4", faults=["execute-fails"])
    with pytest.raises(StageError, match="trtexec cannot run the plan: "):
        BACKEND.open(files, EngineOptions()).run({"image": np.zeros((1, 3, 16, 16), np.float32)})


def test_a_flag_that_a_lane_lacks_would_fail(lane, graphs, monkeypatch) -> None:
    lane("11.4")
    monkeypatch.setattr(trtexec_program, "strong_typing", lambda version: ["--fp16"])
    with pytest.raises(Refused, match="--fp16"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())


@pytest.mark.parametrize("fault", ["no-gpu", "no-driver"])
def test_without_a_gpu_it_does_not_run(fault, lane) -> None:
    lane("10.3", faults=[fault])
    assert BACKEND.missing() is None
    assert str(BACKEND.runnable()).startswith("trtexec finds no GPU")
