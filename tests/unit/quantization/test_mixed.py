"""What a search may choose, on which backend, and the plan that comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.quantization.reaching import GUILTY, LAYERS, Reaching
from tests.unit.quantization.test_search import gates
from vlaopt import backends
from vlaopt.errors import StageError
from vlaopt.progress import Silent
from vlaopt.quantization import mixed
from vlaopt.quantization.plan import NodePlan
from vlaopt.quantization.search import choice_of, start_of
from vlaopt.quantization.trials import Choice, Trials
from vlaopt.target import load_target


class Slow(Trials):
    """Trials on a backend of another name, that take `ms`."""

    ms = 10.0

    def times_ms(self, choices: dict[str, Choice]) -> dict[str, dict[str, float]]:
        if self.ms < 0:
            raise StageError("refused")
        return {label: {"body": self.ms} for label in choices}


def slow(reaching: Reaching, name: str, ms: float) -> Slow:
    trials = Slow(
        reaching.artifact,
        reaching.graphs,
        reaching.plan,
        reaching.target,
        backend="onnxruntime",
        golden=reaching.golden,
    )
    trials.backend, trials.ms = name, ms
    return trials


def test_rules_are_left_alone_and_other_schemes_are_options(reaching: Reaching) -> None:
    dynamic = {"arm": {"leave/Gemm": NodePlan(operator="Gemm", scheme="int8-dynamic", reason="a test")}}
    space = mixed.space_of(reaching.plan, [dynamic], [("body.middle", "int8")])
    assert space.options == {
        ("body", "enter/Gemm"): ("int8", "fp32"),
        ("arm", "leave/Gemm"): ("int8", "int8-dynamic", "fp32"),
    }
    assert space.fixed == {("body", "middle.0/Gemm"): "int8", ("body", "middle.1/Gemm"): "int8"}


def test_the_guilty_layer_of_a_real_policy_is_moved_and_the_plan_says_so(
    reaching: Reaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlaopt.quantization.trials.ROUNDS", 5)
    trials = reaching.trials()
    space = mixed.space_of(reaching.plan, [], [])
    made = mixed.mix(trials, reaching.plan, space, gates, budget=24, journal=None, progress=Silent())
    assert made.report["held"] and trials.error(choice_of(start_of(space))).executed.mean > 0.05
    guilty = made.plan.components["body"].nodes[GUILTY]
    assert guilty.scheme == "fp32" and guilty.reason.startswith(f"search: body.{GUILTY} in fp32 the policy is ")
    assert made.plan.scheme == "mixed"
    assert made.report["evaluations"]["made"] <= 24
    assert made.report["times"] == "measured"
    chosen = {
        name: [node for node, plan in component.nodes.items() if plan.scheme != "fp32"]
        for name, component in made.plan.components.items()
    }
    assert trials.error(chosen).executed.mean <= 0.05


def test_nothing_to_search_is_told(reaching: Reaching) -> None:
    space = mixed.space_of(reaching.plan, [], [("*", "int8")])
    with pytest.raises(StageError, match="there is nothing to search"):
        mixed.mix(reaching.trials(), reaching.plan, space, gates, budget=8, journal=None, progress=Silent())


def test_the_backends_are_those_of_the_target_that_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixed.backends_for(load_target("cpu-x86"))[0] == "onnxruntime"
    assert mixed.backends_for(load_target("jetson-orin")) == ["onnxruntime"], "it stands in"
    monkeypatch.setattr(type(backends.get("onnxruntime")), "missing", lambda self: "not installed")
    assert "onnxruntime" not in mixed.backends_for(load_target("cpu-x86"), "openvino")


def test_the_fastest_backend_is_searched_on_and_kept_after_a_kill(reaching: Reaching, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    first, second = slow(reaching, "first", 10.0), slow(reaching, "second", 9.0)
    assert mixed.on_fastest([first, second], LAYERS, journal, Silent()) is second
    second.ms = 20.0
    assert mixed.on_fastest([first, second], LAYERS, journal, Silent()) is second
    assert mixed.on_fastest([first, second], LAYERS, None, Silent()) is first


def test_a_backend_a_little_faster_or_one_that_refuses_is_not_taken(reaching: Reaching) -> None:
    first, near, refusing = (slow(reaching, str(ms), ms) for ms in (10.0, 9.8, -1.0))
    assert mixed.on_fastest([first, near], LAYERS, None, Silent()) is first
    assert mixed.on_fastest([refusing, near], LAYERS, None, Silent()) is near
