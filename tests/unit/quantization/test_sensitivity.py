"""Sensitivity: parts whose costs and gains are known beforehand, and those of a small policy."""

from __future__ import annotations

import json

import pytest

from tests.unit.quantization.reaching import GUILTY, LAYERS, Reaching
from tests.unit.quantization.test_search import Known, gates
from vlaopt.progress import SilentTask
from vlaopt.quantization.evaluations import Evaluations
from vlaopt.quantization.groups import Node
from vlaopt.quantization.plan import ComponentPlan, NodePlan, NodeScheme, QuantizationPlan
from vlaopt.quantization.sensitivity import Sensitivity, measure, suggestions

COSTS: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
    ("body", "blocks.0.a/Conv"): {"int8": (0.2, 0.5)},
    ("body", "blocks.0.b/Conv"): {"int8": (0.001, 0.5)},
    ("body", "blocks.1.a/Conv"): {"int8": (0.002, 1.0)},
    ("body", "blocks.1.b/Conv"): {"int8": (0.003, 0.8)},
    ("head", "output/Gemm"): {"int8": (0.001, 0.4)},
}
PLAN = QuantizationPlan(
    scheme="int8",
    calibrator="minmax",
    calibration_digest="0" * 64,
    samples=8,
    components={
        component: ComponentPlan(
            graph_digest="0" * 64,
            nodes={
                node: NodePlan(operator="Gemm", scheme="int8", reason="a test")
                for owner, node in COSTS
                if owner == component
            },
        )
        for component in ("body", "head")
    },
)


def measured(budget: int, refuses: Node | None = None) -> Sensitivity:
    evaluations = Evaluations(Known(COSTS, refuses=refuses), budget=budget, task=SilentTask())
    found = measure(PLAN, evaluations, gates)
    assert evaluations.spent <= budget
    return found


def scopes(found: Sensitivity) -> list[str]:
    return [cost.group.scope for cost in found.costs]


def test_a_small_budget_measures_the_components_and_a_larger_one_what_costs_most() -> None:
    assert sorted(scopes(measured(3))) == ["body.blocks", "head.output/Gemm"]
    assert "body.blocks.0.a/Conv" in scopes(measured(7))
    assert "body.blocks.1.a/Conv" not in scopes(measured(7))
    assert len(measured(32).finest()) == len(COSTS)


def test_what_gains_nothing_and_costs_is_worst_then_the_error_per_millisecond() -> None:
    finest = [cost.group.scope for cost in measured(32).finest()]
    assert finest == [
        "body.blocks.1.a/Conv",
        "body.blocks.0.a/Conv",
        "body.blocks.1.b/Conv",
        "body.blocks.0.b/Conv",
        "head.output/Gemm",
    ]


def test_rules_name_what_gains_nothing_what_misses_a_gate_and_what_would_pay() -> None:
    used = [node for node in COSTS if node[0] == "body"]
    told = {rule.scope: (rule.scheme, rule.why) for rule in suggestions(measured(32), used)}
    assert told == {
        "body.blocks.0.a/Conv": ("fp32", "alone it misses mean action error"),
        "body.blocks.1.a/Conv": ("fp32", "it gains no time and costs +0.0020"),
        "head.output/Gemm": ("int8", "it would gain 0.600 ms for +0.0010"),
    }


def test_a_part_that_the_backend_refuses_is_found_first() -> None:
    found = measured(7, refuses=("body", "blocks.1.b/Conv"))
    refused = [cost.group.scope for cost in found.finest() if cost.refused]
    assert refused == ["body.blocks.1.b/Conv"]
    [rule] = [rule for rule in suggestions(found, list(COSTS)) if rule.scope == refused[0]]
    assert (rule.scheme, rule.why) == ("fp32", "the backend refuses it: this backend crashes")


def test_the_guilty_layer_of_a_real_policy_costs_most(reaching: Reaching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaopt.quantization.trials.ROUNDS", 5)
    found = measure(reaching.plan, Evaluations(reaching.trials(), budget=16, task=SilentTask()), gates)
    costs = {cost.group.scope: cost for cost in found.costs}
    assert max(found.finest(), key=lambda cost: cost.error).group.scope == f"body.{GUILTY}"
    assert costs["body"].gain_bytes > costs[f"body.{GUILTY}"].gain_bytes > 0
    assert len(found.finest()) == sum(map(len, LAYERS.values()))
    json.dumps([cost.to_json() for cost in found.costs], allow_nan=False)


def test_figures_are_changes_against_fp32() -> None:
    [cost] = [cost for cost in measured(32).costs if cost.group.scope == "body.blocks.0.b/Conv"]
    assert (cost.error, cost.gain_ms) == (pytest.approx(0.001), pytest.approx(0.5))
    assert cost.per_ms(0.0) == pytest.approx(0.002)
