"""Energy of known laws of power, and a reason wherever a part of it is not known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.benchmark.energy import elapsed_s, joules, per_chunk
from vlaopt.benchmark.sampling import Sampler
from vlaopt.machine.state import State

S = 1_000_000_000


def rail(*pairs: tuple[float, float]) -> list[tuple[int, State]]:
    """Readings of one rail: seconds and watts."""
    return [(round(second * S), State(power_w={"VDD_IN": watts})) for second, watts in pairs]


def counter(*pairs: tuple[float, float]) -> list[tuple[int, State]]:
    """Readings of one counter: seconds and joules."""
    return [(round(second * S), State(energy_j={"package-0": total})) for second, total in pairs]


def test_power_is_integrated_by_trapezoids_over_uneven_moments() -> None:
    # 10 W for 1 s, then from 10 to 30 W over 3 s
    assert joules(rail((5, 10), (6, 10), (9, 30)), ["VDD_IN"]) == pytest.approx({"VDD_IN": 10 + 60})


def test_a_counter_gives_its_difference_whatever_happened_between() -> None:
    assert joules(counter((5, 100), (6, 190), (7, 191)), ["package-0"]) == pytest.approx({"package-0": 91})


@pytest.mark.parametrize(
    ("missing", "source"),
    [
        ({}, "nvml"),
        ({"clocks_mhz": "no cpufreq"}, "nvml"),
        ({"energy_j": "RAPL counters cannot be read: Permission denied"},
         "nvml; not counted: RAPL counters cannot be read: Permission denied"),
    ],
)  # fmt: skip
def test_what_a_sum_does_not_count_is_said_with_its_source(missing: dict[str, str], source: str) -> None:
    sampler = Sampler()
    sampler.board, sampler.sources, sampler.missing = ("VDD_IN",), ("nvml",), missing
    found = per_chunk(sampler, rail((0, 10), (4, 10)), [], chunks=8)
    assert (found.joules, found.source, found.reason) == (5.0, source, None)


def test_a_counter_is_taken_before_the_power_of_the_same_name() -> None:
    readings = [(second * S, State(power_w={"gpu0": 100.0}, energy_j={"gpu0": 7.0 * second})) for second in (0, 1, 2)]
    assert joules(readings, ["gpu0"]) == pytest.approx({"gpu0": 14})


def test_only_the_names_of_the_board_are_counted_each_once() -> None:
    readings = [
        (second * S, State(power_w={"VDD_IN": 30.0, "VDD_CPU_CV": 9.0}, energy_j={"package-0": 4.0 * second}))
        for second in (0, 2)
    ]
    parts = joules(readings, ["VDD_IN", "package-0"])
    assert parts == pytest.approx({"VDD_IN": 60, "package-0": 8})


def test_a_reading_that_failed_at_an_edge_is_taken_to_be_like_the_rest() -> None:
    readings = [(0, State()), *rail((0.5, 10), (5, 10), (10, 10))]
    assert joules(readings, ["VDD_IN"]) == pytest.approx({"VDD_IN": 100})


@pytest.mark.parametrize(
    ("readings", "names", "reason"),
    [
        ([], ["VDD_IN"], "VDD_IN was read too seldom (0)"),
        (rail((0, 10)), ["VDD_IN"], "VDD_IN was read too seldom (1)"),
        (rail((0, 10), (1, 10)), ["VDD_IN", "VDD_SOC"], "VDD_SOC was read too seldom (0)"),
        ([*rail((0, 10), (1, 10)), (10 * S, State())], ["VDD_IN"], "VDD_IN was read for 1 s of 10 s only"),
        (rail((1, 10), (1, 10)), ["VDD_IN"], "VDD_IN was read for 0 s of 0 s only"),
        (counter((0, 10), (1, 3), (2, 12)), ["package-0"], "package-0 is a counter that went back"),
    ],
)
def test_what_is_not_known_is_a_reason(readings: list[tuple[int, State]], names: list[str], reason: str) -> None:
    assert joules(readings, names) == reason


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 500)), min_size=2, max_size=50))
def test_energy_lies_between_the_least_and_the_most_power(steps: list[tuple[float, float]]) -> None:
    moments, second = [], 0.0
    for gap, watts in steps:
        second += gap
        moments.append((second, watts))
    readings = rail(*moments)
    spent = joules(readings, ["VDD_IN"])
    assert isinstance(spent, dict)
    watts_seen = [watts for _, watts in moments]
    whole_s = elapsed_s(readings)
    assert min(watts_seen) * whole_s * (1 - 1e-9) <= spent["VDD_IN"] <= max(watts_seen) * whole_s * (1 + 1e-9)
