"""Trials: parts of a plan in low precision, their action error and time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.quantization.reaching import GUILTY, LAYERS, STATE, WIDTH, Reaching
from vlaopt import backends
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.quantization.trials import Trials
from vlaopt.target import load_target


def test_nothing_chosen_is_the_golden_actions(reaching: Reaching) -> None:
    assert reaching.trials().error({}).executed.max < 1e-5


def test_the_error_is_that_of_the_chosen_nodes(reaching: Reaching) -> None:
    trials = reaching.trials()
    guilty = trials.error({"body": [GUILTY]}).executed.mean
    innocent = trials.error({"body": [node for node in LAYERS["body"] if node != GUILTY]}).executed.mean
    assert 0 < innocent < guilty / 3


def test_equal_choices_are_run_once(reaching: Reaching, monkeypatch: pytest.MonkeyPatch) -> None:
    trials, library = reaching.trials(), backends.get("onnxruntime")
    opened: list[Any] = []
    original = library.open

    def counted(files: Any, options: Any) -> Any:
        opened.append(files)
        return original(files, options)

    monkeypatch.setattr(library, "open", counted)
    first = trials.error({"body": [*LAYERS["body"], *LAYERS["body"]], "arm": []})
    assert len(opened) == 2
    assert trials.error({"body": list(reversed(LAYERS["body"]))}) is first
    assert len(opened) == 2
    trials.error({"body": LAYERS["body"], "arm": LAYERS["arm"]})
    assert len(opened) == 3, "the unchanged component was opened again"


def test_times_are_of_every_component_of_every_choice(reaching: Reaching) -> None:
    times = reaching.trials().times_ms({"fp32": {}, "int8": LAYERS})
    assert {label: set(found) for label, found in times.items()} == {key: {"body", "arm"} for key in ("fp32", "int8")}
    assert all(0 < ms < 1000 for found in times.values() for ms in found.values())


def test_times_of_another_machine_are_estimated_by_multiply_adds(reaching: Reaching) -> None:
    trials = reaching.trials(load_target("jetson-orin"))
    assert not trials.measured
    times = trials.times_ms({"fp32": {}, "int8": LAYERS, "part": {"body": [LAYERS["body"][1]]}})
    assert times["int8"] == {name: pytest.approx(ms / 2) for name, ms in times["fp32"].items()}
    enter, *middle = STATE * WIDTH, WIDTH * WIDTH, WIDTH * WIDTH
    share = middle[0] / (enter + sum(middle))
    assert times["part"]["body"] == pytest.approx(times["fp32"]["body"] * (1 - share / 2))
    assert times["part"]["arm"] == times["fp32"]["arm"]
    assert 0 < trials.error(LAYERS).executed.mean < 1, "symmetric int8, as TensorRT takes it"


def test_schemes_other_than_the_plans_may_be_chosen(reaching: Reaching) -> None:
    trials = reaching.trials()
    dynamic = trials.error({"body": {GUILTY: "int8-dynamic"}}).executed.mean
    assert 0 < dynamic < trials.error({"body": [GUILTY]}).executed.mean / 3, (
        "a range found while running is never wrong"
    )
    assert trials.error({"body": {GUILTY: "fp32"}}) is trials.error({})


def test_a_quantized_choice_is_smaller(reaching: Reaching) -> None:
    trials = reaching.trials()
    assert trials.size({}) == sum(graph.size for graph in reaching.graphs.values())
    assert trials.size({"body": LAYERS["body"]}) < trials.size({})


@pytest.mark.parametrize("chosen", [{"body": ["nowhere/Gemm"]}, {"leg": ["nowhere/Gemm"]}])
def test_a_node_that_the_plan_lacks_is_refused(reaching: Reaching, chosen: dict[str, list[str]]) -> None:
    with pytest.raises(InputError, match=r"the plan of (body|leg) has no node 'nowhere/Gemm'"):
        reaching.trials().error(chosen)


def test_a_backend_that_cannot_run_here_is_refused(reaching: Reaching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backends.get("onnxruntime")), "missing", lambda self: "not installed")
    with pytest.raises(EnvironmentProblem, match="onnxruntime cannot run here: not installed"):
        Trials(
            reaching.artifact,
            reaching.graphs,
            reaching.plan,
            reaching.target,
            backend="onnxruntime",
            golden=reaching.golden,
        )


def test_golden_actions_are_those_of_the_graphs(reaching: Reaching) -> None:
    assert np.isfinite(reaching.golden.actions).all()
    assert reaching.golden.actions.std() > 0
