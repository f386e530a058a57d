"""The search: plans of a policy whose errors and times are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.benchmark.actions import ActionError, ErrorStatistics, Limit
from vlaopt.errors import StageError
from vlaopt.progress import SilentTask
from vlaopt.quantization.evaluations import Evaluations, read_journal
from vlaopt.quantization.groups import Node, grouped
from vlaopt.quantization.plan import NodeScheme
from vlaopt.quantization.search import Found, Space, choice_of, search, start_of
from vlaopt.quantization.trials import Choice, Chosen

LIMIT = 0.05


@dataclass
class Known:
    """Runs whose every node adds its own error and milliseconds, by scheme; FP32 adds no error and 1 ms."""

    costs: Mapping[Node, Mapping[NodeScheme, tuple[float, float]]]
    refuses: Node | None = None
    runs: list[Chosen] = field(default_factory=list)
    """Whose error was asked for."""
    timed: int = 0

    def normal(self, chosen: Choice) -> Chosen:
        schemes: dict[str, dict[str, NodeScheme]] = {component: {} for component, _ in self.costs}
        for component, nodes in chosen.items():
            given = nodes if isinstance(nodes, Mapping) else dict.fromkeys(nodes, "int8")
            schemes[component] |= {node: scheme for node, scheme in given.items() if scheme != "fp32"}
        return tuple((component, frozenset(nodes.items())) for component, nodes in schemes.items())

    def error(self, chosen: Choice) -> ActionError:
        normal = self.normal(chosen)
        self._open(normal)
        self.runs.append(normal)
        return action_error(sum(self.costs[c, n][s][0] for c, nodes in normal for n, s in nodes))

    def times_ms(self, choices: Mapping[str, Choice]) -> dict[str, dict[str, float]]:
        for chosen in choices.values():
            self._open(self.normal(chosen))
        self.timed += 1
        return {label: self._times(self.normal(chosen)) for label, chosen in choices.items()}

    def size(self, chosen: Choice) -> int:
        return 1000 - sum(len(nodes) for _, nodes in self.normal(chosen))

    def _open(self, chosen: Chosen) -> None:
        if self.refuses and dict(dict(chosen)[self.refuses[0]]).get(self.refuses[1]) == "int8":
            raise StageError("this backend crashes")

    def _times(self, chosen: Chosen) -> dict[str, float]:
        return {
            component: sum(
                self.costs[component, node][dict(nodes)[node]][1] if node in dict(nodes) else 1.0
                for owner, node in self.costs
                if owner == component
            )
            for component, nodes in chosen
        }


def action_error(mean: float) -> ActionError:
    statistics = ErrorStatistics(mean, 2 * mean, 4 * mean)
    return ActionError(8, statistics, statistics, (statistics,), 0.0, 0.0, 0.0, mean)


def gates(error: ActionError) -> list[Limit]:
    return [Limit("mean action error", error.executed.mean, LIMIT)]


def space(costs: Mapping[Node, Mapping[NodeScheme, tuple[float, float]]]) -> Space:
    return Space({node: (*schemes, "fp32") for node, schemes in costs.items()}, {})


def found(runs: Known, *, budget: int = 32, journal: Path | None = None) -> tuple[Found, Evaluations]:
    wanted = space(runs.costs)
    evaluations = Evaluations(
        runs, budget=budget, uniform=choice_of(start_of(wanted)), task=SilentTask(), journal=journal
    )
    return search(wanted, evaluations, gates), evaluations


def test_the_worst_per_millisecond_is_reverted_until_the_limits_hold() -> None:
    costs: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
        ("body", "a/Gemm"): {"int8": (0.01, 0.5)},
        ("body", "b/Gemm"): {"int8": (0.2, 0.6)},
        ("body", "c/Gemm"): {"int8": (0.02, 0.5)},
        ("head", "d/Gemm"): {"int8": (0.01, 0.5)},
    }
    result, _ = found(Known(costs))
    assert result.inside
    assert [node for node, scheme in result.schemes.items() if scheme == "fp32"] == [("body", "b/Gemm")]
    assert "mean action error 0.0400 instead of 0.2400 of uniform int8, which misses a limit" in result.verdict
    assert "+0.400 ms" in result.reasons["body", "b/Gemm"]


def test_what_gains_no_time_and_costs_error_is_dropped() -> None:
    costs: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
        ("body", "a/Gemm"): {"int8": (0.01, 0.4)},
        ("body", "b/Gemm"): {"int8": (0.01, 1.0)},
        ("head", "c/Gemm"): {"int8": (0.01, 1.2)},
    }
    result, _ = found(Known(costs))
    assert list(result.schemes.values()) == ["int8", "fp32", "fp32"]
    assert result.evaluation.error == action_error(0.01)


def test_another_scheme_that_is_as_fast_and_more_exact_is_taken() -> None:
    costs: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
        ("head", "a/Gemm"): {"int8": (0.02, 0.4), "int8-dynamic": (0.001, 0.4)},
        ("head", "b/Gemm"): {"int8": (0.005, 0.4), "int8-dynamic": (0.001, 0.7)},
    }
    result, _ = found(Known(costs))
    assert dict(result.schemes) == {("head", "a/Gemm"): "int8-dynamic", ("head", "b/Gemm"): "int8"}


def test_what_was_moved_too_far_is_put_back() -> None:
    nodes: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
        ("body", f"layers.{index}/Gemm"): {"int8": (0.012, 0.5)} for index in range(8)
    }
    result, _ = found(Known(nodes), budget=48)
    assert result.inside
    assert [*result.schemes.values()].count("int8") == 4, "0.05 has room for four of 0.012"


def test_uniform_is_kept_and_said_to_be_best() -> None:
    result, _ = found(Known({("body", "a/Gemm"): {"int8": (0.01, 0.4)}, ("head", "b/Gemm"): {"int8": (0.01, 0.4)}}))
    assert set(result.schemes.values()) == {"int8"}
    assert result.verdict.startswith("uniform int8 is already best")


def test_limits_that_nothing_holds_are_reported() -> None:
    class Far(Known):
        def error(self, chosen: Choice) -> ActionError:
            return action_error(1.0)

    result, _ = found(Far({("body", "a/Gemm"): {"int8": (0.0, 0.4)}}))
    assert not result.inside
    assert result.verdict.startswith("nothing within the limits was found")


def test_a_node_that_the_backend_refuses_is_reverted() -> None:
    nodes: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
        ("body", name): {"int8": (0.001, 0.5)} for name in ("a/Gemm", "b/Gemm", "c/Gemm")
    }
    result, _ = found(Known(nodes, refuses=("body", "b/Gemm")))
    assert dict(result.schemes)["body", "b/Gemm"] == "fp32"
    assert [*result.schemes.values()].count("int8") == 2
    assert "this backend crashes" in result.verdict


def test_a_budget_that_ends_before_the_limits_hold_is_spent_on_putting_back_what_pays_most() -> None:
    nodes: dict[Node, dict[NodeScheme, tuple[float, float]]] = {
        ("body", f"layers.{index}/Gemm"): {"int8": (0.03 + index / 1000, 0.9 - index / 10)} for index in range(5)
    }
    result, evaluations = found(Known(nodes), budget=11)
    assert evaluations.spent <= 11
    assert result.inside
    assert "int8" in result.schemes.values()


costs_of_nodes = st.dictionaries(
    st.tuples(st.sampled_from(["body", "head"]), st.sampled_from([f"m{i}.{j}/Gemm" for i in "ab" for j in "123"])),
    st.fixed_dictionaries(
        {
            "int8": st.tuples(st.floats(0, 0.06), st.floats(0.2, 1.3)),
            "int8-dynamic": st.tuples(st.floats(0, 0.03), st.floats(0.3, 1.3)),
        }
    ),
    min_size=1,
)


@given(costs_of_nodes, st.integers(8, 40))
def test_the_plan_is_within_the_limits_the_budget_and_as_good_as_uniform(
    costs: Mapping[Node, Mapping[NodeScheme, tuple[float, float]]], budget: int
) -> None:
    runs = Known(costs)
    result, evaluations = found(runs, budget=budget)
    assert runs.timed == evaluations.spent <= budget
    assert result.inside, "FP32 has no error here"
    uniform = evaluations.of(choice_of(start_of(space(costs))))
    assert uniform and uniform.error and result.evaluation.error
    if uniform.error.executed.mean <= LIMIT:
        slower_ms = result.evaluation.beside("uniform")
        tolerance_ms = 0.01 * sum(uniform.times_ms.values())
        assert slower_ms <= tolerance_ms + 1e-9
        exacter = result.evaluation.error.executed.mean <= uniform.error.executed.mean
        assert exacter or slower_ms < 0
    again, _ = found(Known(costs), budget=budget)
    assert again.schemes == result.schemes


@settings(max_examples=40)
@given(costs_of_nodes, st.integers(8, 40), st.integers(1, 12))
def test_a_killed_search_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    costs: Mapping[Node, Mapping[NodeScheme, tuple[float, float]]],
    budget: int,
    killed_after: int,
) -> None:
    class Killed(Known):
        def times_ms(self, choices: Mapping[str, Choice]) -> dict[str, dict[str, float]]:
            if self.timed == killed_after:
                raise KeyboardInterrupt
            return super().times_ms(choices)

    journal = tmp_path_factory.mktemp("killed") / "journal.jsonl"
    first, second = Killed(costs), Known(costs)
    try:
        found(first, budget=budget, journal=journal)
    except KeyboardInterrupt:
        with journal.open("ab") as file:  # the line of an evaluation that was cut off
            file.write(b'\n{"choice":"0123')
    result, evaluations = found(second, budget=budget, journal=journal)
    whole, once = found(Known(costs), budget=budget)
    assert result.schemes == whole.schemes
    assert first.timed + second.timed == evaluations.spent == once.spent
    assert evaluations.resumed == first.timed


def test_a_journal_gives_back_what_was_put_in(tmp_path: Path) -> None:
    runs = Known({("body", "a/Gemm"): {"int8": (0.1, 0.4)}}, refuses=("body", "a/Gemm"))
    _, evaluations = found(runs, journal=tmp_path / "deep" / "journal.jsonl")
    kept = read_journal(tmp_path / "deep" / "journal.jsonl")
    assert len(kept) == evaluations.spent
    assert {evaluation.refused for evaluation in kept.values()} == {None, "this backend crashes"}


@given(
    st.lists(
        st.tuples(st.sampled_from("xyz"), st.from_regex(r"[ab](\.[0-2]){0,3}/(Gemm|Conv)", fullmatch=True)),
        unique=True,
        min_size=1,
    ),
    st.integers(1, 20),
)
def test_groups_are_a_partition_of_the_nodes(nodes: list[Node], most: int) -> None:
    groups = grouped(nodes, most)
    assert sorted(node for group in groups for node in group.nodes) == sorted(nodes)
    assert len(groups) <= max(most, len({component for component, _ in nodes}))
    assert len({group.scope for group in groups}) == len(groups)
    if most >= len(nodes):
        assert all(len(group.nodes) == 1 for group in groups)


def test_groups_are_named_by_what_a_rule_would_say() -> None:
    nodes = [("head", f"layers.{index}/Gemm") for index in range(3)] + [("vision", "stem/Conv")]
    assert [group.scope for group in grouped(nodes, 2)] == ["head.layers", "vision.stem/Conv"]
    assert [group.scope for group in grouped(nodes, 3)][:2] == [
        "head.layers.0/Gemm",
        "head.layers.1/Gemm … head.layers.2/Gemm",
    ]
    assert [group.scope for group in grouped(nodes, 4)][:2] == ["head.layers.0/Gemm", "head.layers.1/Gemm"]
