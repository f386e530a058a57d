"""FASTER, SLOWER and SAME are said only when they are so, and said when they are so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.benchmark.compare import Answer, affordable, compare, compare_rounds, interleave
from vlaopt.errors import InputError

OBSERVATIONS = [{"index": np.array(index)} for index in range(5)]


def launches(median_ms: float, spread: float = 0.005, count: int = 20) -> np.ndarray:
    return median_ms * (1 + spread * np.random.default_rng(int(median_ms * 1000)).standard_normal(count))


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        (launches(10.0), launches(3.0), "FASTER"),
        (launches(10.0), launches(12.0), "SLOWER"),
        (launches(10.0), launches(10.05), "SAME"),
        (launches(10.0, 0.3), launches(10.5, 0.3), "UNCLEAR"),
        (launches(10.0), launches(10.0), "SAME"),
    ],
)
def test_the_answer_says_what_b_is(a: np.ndarray, b: np.ndarray, answer: str) -> None:
    assert compare(a, b).answer == answer


def test_the_figures_beside_the_answer() -> None:
    comparison = compare(launches(12.0), launches(4.0))
    assert comparison.speedup == pytest.approx(3.0, rel=0.02)
    assert comparison.ratio == pytest.approx(1 / 3, rel=0.02)
    assert comparison.difference_low_ms < -7.9 < comparison.difference_high_ms + 0.2
    assert comparison.p_value < 1e-6


TRIALS = 100
RUNS = 20


def answers(ratio: float, spread: float, runs: int = RUNS) -> Counter[Answer]:
    """What TRIALS comparisons say of a B that takes `ratio` of A's time.

    Launches are log-normal about their policy's latency, `spread` being their standard deviation.
    """
    rng = np.random.default_rng(round(1000 * (ratio + spread)))
    told: Counter[Answer] = Counter()
    for trial in range(TRIALS):
        a, b = np.exp(spread * rng.standard_normal((2, runs)))
        told[compare(10.0 * a, 10.0 * ratio * b, seed=trial).answer] += 1
    return told


def test_a_policy_held_against_itself_is_the_same_in_95_of_100_trials() -> None:
    assert answers(1.0, 0.01)["SAME"] >= 95


@pytest.mark.parametrize(("ratio", "answer"), [(1.05, "SLOWER"), (1 / 1.05, "FASTER")])
@pytest.mark.parametrize("spread", [0.01, 0.02])
def test_a_change_of_5_percent_is_seen_in_95_of_100_trials(ratio: float, answer: Answer, spread: float) -> None:
    assert answers(ratio, spread)[answer] >= 95


@pytest.mark.parametrize(("spread", "runs"), [(0.02, 60), (0.03, 150)])
def test_launches_that_differ_more_leave_it_unclear_and_more_of_them_tell(spread: float, runs: int) -> None:
    few = answers(1.0, spread)
    assert few["SAME"] + few["UNCLEAR"] >= 98
    assert few["UNCLEAR"] > 20
    assert answers(1.0, spread, runs)["SAME"] >= 95


@pytest.mark.parametrize("spread", [0.005, 0.01, 0.03, 0.1])
def test_equal_policies_are_hardly_ever_said_to_differ(spread: float) -> None:
    told = answers(1.0, spread)
    assert told["FASTER"] + told["SLOWER"] <= 3


def in_rounds(ratio: float, *, drift: float, spread: float) -> Counter[Answer]:
    """As `answers` for rounds on a machine whose speed wanders by `drift` from one to the next."""
    rng = np.random.default_rng(round(1000 * (ratio + drift + spread)))
    told: Counter[Answer] = Counter()
    for trial in range(TRIALS):
        machine = 10.0 * np.exp(np.cumsum(drift * rng.standard_normal(RUNS)))
        a, b = np.exp(spread * rng.standard_normal((2, RUNS)))
        told[compare_rounds(machine * a, machine * ratio * b, seed=trial).answer] += 1
    return told


@pytest.mark.parametrize(("ratio", "answer"), [(1.0, "SAME"), (1.05, "SLOWER"), (1 / 1.05, "FASTER")])
@pytest.mark.parametrize(("drift", "spread"), [(0.0, 0.01), (0.01, 0.005)])
def test_rounds_tell_in_95_of_100_trials_also_on_a_machine_whose_speed_wanders(
    ratio: float, answer: Answer, drift: float, spread: float
) -> None:
    """40 launches of one policy on two shared cores differed by 1.7 %, within a round by 0.5 %."""
    assert in_rounds(ratio, drift=drift, spread=spread)[answer] >= 95


def test_rounds_are_as_many_on_both_sides() -> None:
    with pytest.raises(InputError, match="10 rounds of A and 11 of B"):
        compare_rounds([1.0] * 10, [1.0] * 11)


def test_what_a_small_difference_is_not_is_the_same() -> None:
    """3 % is beyond what counts as the same: with 5 % error a side, SAME is said of it in 5 of 100 trials at most."""
    assert answers(1.03, 0.01)["SAME"] <= 5
    assert answers(1.0201, 0.01)["SAME"] <= 10


def test_what_the_samples_cannot_tell_widens_the_interval() -> None:
    alike, apart = (launches(10.0), launches(10.01)), (launches(10.0), launches(10.3))
    assert compare(*alike).answer == "SAME"
    assert compare(*alike, unseen=0.014).answer == "UNCLEAR"
    assert compare(*apart).answer == "SLOWER"
    wider = compare(*apart, unseen=0.014)
    assert (wider.answer, wider.ratio) == ("UNCLEAR", compare(*apart).ratio)
    assert wider.ratio_high / compare(*apart).ratio_high == pytest.approx(np.exp(2.576 * 0.014), rel=1e-4)


@settings(max_examples=30)
@given(st.lists(st.floats(1, 100), min_size=10, max_size=40), st.floats(0.5, 2.0))
def test_the_unit_of_time_does_not_matter(a: list[float], ratio: float) -> None:
    b = [value * ratio for value in reversed(a)]
    small, large = compare(a, b), compare([1000 * value for value in a], [1000 * value for value in b])
    assert small.answer == large.answer
    assert small.ratio_low == pytest.approx(large.ratio_low)
    assert small.ratio == pytest.approx(ratio)


@settings(max_examples=30)
@given(st.lists(st.floats(1, 100), min_size=10, max_size=40), st.lists(st.floats(1, 100), min_size=10, max_size=40))
def test_exchanging_the_sides_never_makes_both_faster(a: list[float], b: list[float]) -> None:
    assert {compare(a, b).answer, compare(b, a).answer} not in ({"FASTER"}, {"SLOWER"})


@pytest.mark.parametrize(
    ("b", "message"),
    [([1.0] * 9, "9 measurements of B, 10 are needed"), ([1.0] * 9 + [0.0], "latency of B is not a number above 0")],
)
def test_too_few_or_impossible_latencies_are_refused(b: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare([1.0] * 10, b)


def test_interleaved_calls_take_turns_and_see_the_same_observations(clock: Any) -> None:
    turns: list[tuple[str, int]] = []

    def call(name: str, milliseconds: float) -> Callable[[Mapping[str, Any]], None]:
        def run(observation: Mapping[str, Any]) -> None:
            turns.append((name, int(observation["index"])))
            clock.work(milliseconds)

        return run

    calls = {"eager": call("eager", 30.0), "engine": call("engine", 10.0)}
    measured = interleave(calls, OBSERVATIONS, rounds=20, iterations_per_round=3, warmup=2, clock=clock)
    samples = measured.samples_ms
    assert (measured.rounds, measured.iterations_per_round, measured.count) == (20, 3, 60)
    assert measured.warmups == {"eager": 2, "engine": 2}
    assert samples["eager"].tolist() == [30.0] * 60
    assert samples["engine"].tolist() == [10.0] * 60
    assert turns[:4] == [("eager", 0), ("eager", 1), ("engine", 0), ("engine", 1)]
    rounds = [turns[4 + 3 * place : 7 + 3 * place] for place in range(40)]
    first = [rounds[2 * place][0][0] for place in range(20)]
    assert {"eager", "engine"} == set(first)
    assert [index for name, index in turns[4:] if name == "eager"] == [n % 5 for n in range(60)]
    assert [index for name, index in turns[4:] if name == "engine"] == [n % 5 for n in range(60)]
    assert compare(samples["eager"], samples["engine"]).speedup == 3.0


def test_interleaving_needs_observations(clock: Any) -> None:
    with pytest.raises(InputError, match="no observations"):
        interleave({"a": print}, [], rounds=1, iterations_per_round=1, clock=clock)


@pytest.mark.parametrize(
    ("milliseconds", "rounds", "iterations", "warmup"),
    [(1.0, 12, 16, 10), (26.0, 12, 16, 10), (100.0, 12, 4, 10), (1000.0, 5, 1, 2), (2500.0, 3, 1, 2), (60e3, 3, 1, 2)],
)
def test_slow_calls_are_measured_less_often_but_always_in_turns(
    clock: Any, milliseconds: float, rounds: int, iterations: int, warmup: int
) -> None:
    calls = {"slow": lambda _: clock.work(milliseconds), "fast": lambda _: clock.work(0.5)}
    measured = interleave(calls, OBSERVATIONS, rounds=12, iterations_per_round=16, clock=clock)
    assert (measured.rounds, measured.iterations_per_round) == (rounds, iterations)
    assert measured.warmups == {"slow": warmup, "fast": 10}
    assert {len(samples) for samples in measured.samples_ms.values()} == {measured.count}


def test_a_first_call_that_is_slow_does_not_count_for_the_others(clock: Any) -> None:
    times = iter([3000.0, *[1.0] * 300])
    measured = interleave(
        {"a": lambda _: clock.work(next(times))}, OBSERVATIONS, rounds=12, iterations_per_round=16, clock=clock
    )
    assert (measured.count, measured.warmups) == (192, {"a": 2})


@given(
    call_s=st.floats(0, 1e4),
    rounds=st.integers(1, 50),
    iterations=st.integers(1, 50),
    seconds=st.floats(0.1, 100),
    fewest=st.integers(1, 50),
)
def test_what_is_affordable_keeps_within_its_time_or_is_the_fewest(
    call_s: float, rounds: int, iterations: int, seconds: float, fewest: int
) -> None:
    got = affordable(
        call_s, rounds=rounds, iterations_per_round=iterations, seconds=seconds, fewest_rounds=min(fewest, rounds)
    )
    assert min(fewest, rounds) <= got[0] <= rounds
    assert 1 <= got[1] <= iterations
    assert got == (min(fewest, rounds), 1) or call_s * got[0] * got[1] <= seconds * (1 + 1e-9)
