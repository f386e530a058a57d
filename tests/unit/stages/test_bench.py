"""The promise: actions are checked while the clock runs, each against what its own noise gave the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from vlaopt.artifact.artifact import SPEC_PATH, Artifact
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    EulerLoop,
    Noise,
    NormaliseProcessor,
    PolicySpec,
    TensorSpec,
    Unnormalise,
)
from vlaopt.benchmark.record import BenchSettings
from vlaopt.errors import InputError
from vlaopt.hashing import canonical_json
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.runtime.golden import Golden
from vlaopt.stages.bench import bench_artifact, metrics, settings_of, sweep_of
from vlaopt.tensors import pack

CPU = Path(__file__).parents[3] / "recipes/edge-vla/cpu.yaml"
QUICK = BenchSettings(hz=200, duration_s=0.1, back_to_back_s=0.05)


def spec() -> PolicySpec:
    """One step component, v = state: an Euler loop from 0 to 1 adds the state to the noise."""

    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    inputs = (tensor("x", 1, 2, 2), tensor("t", 1), tensor("state", 1, 2))
    return PolicySpec(
        type="flow",
        action_dim=2,
        control_hz=10,
        components={"flow": Component(kind="step", inputs=inputs, outputs=(tensor("v", 1, 2, 2),))},
        loop=EulerLoop(steps=2, start=0.0, end=1.0, step="flow", state_input="x", time_input="t", velocity_output="v"),
        noise=Noise(law="normal", shape=(1, 2, 2)),
        chunk=Chunk(size=2, n_action_steps=2),
        preprocess=(NormaliseProcessor(input="joints", output="state", size=2, statistics="unit"),),
        postprocess=Unnormalise(input="x", statistics="unit"),
    )


def velocity() -> bytes:
    """v = state, added to zeros of the shape of x; the time takes part with nothing."""
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["zeros"]),
        helper.make_node("Sub", ["t", "t"], ["nothing"]),
        helper.make_node("Add", ["zeros", "state"], ["moved"]),
        helper.make_node("Add", ["moved", "nothing"], ["v"]),
    ]
    shapes = {"x": [1, 2, 2], "t": [1], "state": [1, 2]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 2, 2])]
    model = helper.make_model(
        helper.make_graph(nodes, "flow", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    written: bytes = model.SerializeToString()
    return written


@pytest.fixture
def artifact(tmp_path: Path, publish: Callable[..., Artifact]) -> Callable[[float], Artifact]:
    """A flow policy with golden actions that are off by so much."""

    def make(off: float) -> Artifact:
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((3, 1, 2, 2)).astype(np.float32)
        states = rng.standard_normal((3, 2)).astype(np.float32)
        golden = Golden(
            tuple({"joints": state} for state in states), noise[:, 0] + states[:, None] + np.float32(off), noise
        )
        files: dict[str, tuple[str, Any]] = {
            SPEC_PATH: ("policy", canonical_json(spec().model_dump(mode="json", by_alias=True))),
            "policy/statistics.safetensors": (
                "policy",
                pack({"unit.mean": np.zeros(2, np.float32), "unit.std": np.ones(2, np.float32)}),
            ),
            component_path("flow"): ("component", velocity()),
        }
        inputs = [{"state": state[None]} for state in states]
        files |= {path: ("golden", data) for path, data in golden.files(inputs).items()}
        return publish(tmp_path / "artifact", files)

    return make


def test_a_policy_with_noise_is_held_to_its_golden_actions(artifact: Callable[[float], Artifact]) -> None:
    record = bench_artifact(artifact(0.0), QUICK, Silent())
    assert record.actions.checked > 20
    assert record.actions.worst_difference is not None
    assert record.actions.worst_difference < 0.1
    assert record.verdict != "INVALID"


def test_the_record_tells_more_than_latency(artifact: Callable[[float], Artifact]) -> None:
    ticks: list[int] = []
    record = bench_artifact(artifact(0.0), QUICK, Silent(), sweep={"steps": (4, 1), "batch": ()}, on_tick=ticks.append)
    assert record.cold_start is not None
    assert min(record.cold_start.import_ms, record.cold_start.open_ms, record.cold_start.first_ms) > 0
    assert record.breakdown is not None
    assert record.breakdown.components["flow"].calls == 2
    assert [(curve.over, [point.value for point in curve.points]) for curve in record.curves] == [("steps", [1, 4])]
    assert len(ticks) == record.paced.ticks  # dropped ones too, when their latency is known
    assert metrics(record)["cold_start_ms"] == record.cold_start.total_ms


def test_numbers_of_steps_that_the_loop_cannot_take_are_refused_before_anything_is_measured(
    artifact: Callable[[float], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlaopt.stages.bench.launch", lambda *given, **known: pytest.fail("something was started"))
    with pytest.raises(InputError, match="steps: "):
        bench_artifact(artifact(0.0), QUICK, Silent(), sweep={"steps": (2, 0)})


def test_a_recipe_asks_for_load_and_sweeps() -> None:
    recipe = load_recipe(CPU, overrides=("bench.load=2", "bench.sweep.steps=[1, 5]", "bench.hz=50"))
    assert (settings_of(recipe.bench).load, settings_of(recipe.bench).hz) == (2, 50)
    assert sweep_of(recipe.bench) == {"steps": (1, 5), "batch": ()}


def test_actions_that_are_off_make_the_measurement_invalid(artifact: Callable[[float], Artifact]) -> None:
    record = bench_artifact(artifact(0.5), QUICK, Silent(), tolerance=0.1)
    assert record.verdict == "INVALID"
    assert record.reasons[0].startswith("actions differ")


@pytest.mark.parametrize(("stage", "found"), [("verify", "golden"), ("engine", "action_error")])
def test_what_the_golden_observations_gave_before_is_what_actions_may_be_off_by(
    artifact: Callable[[float], Artifact], stage: str, found: str
) -> None:
    measured = artifact(0.5)
    metrics = {stage: {found: {"executed": {"max": 0.4}}}}
    known = replace(measured, manifest=measured.manifest.model_copy(update={"metrics": metrics}))
    record = bench_artifact(known, QUICK, Silent())
    assert record.actions.worst_difference == pytest.approx(0.5 / (2 * 0.4), abs=1e-3)
    assert bench_artifact(measured, QUICK, Silent()).verdict == "INVALID"
