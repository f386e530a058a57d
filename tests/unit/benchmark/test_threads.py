"""The promise: threads are taken only where they pay, whatever the machine has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.benchmark.conftest import FakeClock
from vlaopt.benchmark.threads import WORTH, ThreadChoice, choose_threads
from vlaopt.errors import InputError

SAMPLES = [0, 1, 2]


def chosen(cores: int, latency_ms: Callable[[int], float]) -> tuple[ThreadChoice, list[int]]:
    """What is chosen where a call on n threads takes `latency_ms(n)`, and the counts that were opened."""
    clock, asked = FakeClock(), list[int]()

    def opened(threads: int) -> Callable[[Any], None]:
        asked.append(threads)
        return lambda _: clock.work(latency_ms(threads))

    return choose_threads(opened, SAMPLES, cores=cores, rounds=4, iterations_per_round=2, clock=clock), asked


def test_a_policy_that_scales_gets_every_core() -> None:
    found, asked = chosen(6, lambda threads: 600 / threads)
    assert found == ThreadChoice(6, {2: 2.0, 4: 2.0, 6: 1.5})
    assert asked == [1, 2, 4, 6]


def test_a_small_policy_stays_on_one_thread_and_no_more_are_tried() -> None:
    found, asked = chosen(64, lambda threads: 1.0 + 0.1 * threads)
    assert found.threads == 1
    assert asked == [1, 2]
    assert found.speedups[2] < 1


def test_threads_that_hardly_help_are_left_to_the_robots_other_programs() -> None:
    assert chosen(2, lambda threads: 100.0 if threads == 1 else 96.0)[0].threads == 1
    assert chosen(2, lambda threads: 100.0 if threads == 1 else 85.0)[0].threads == 2


def test_one_core_needs_no_measurement() -> None:
    assert chosen(1, lambda _: 1 / 0) == (ThreadChoice(1, {}), [1])


def test_it_needs_something_to_measure_with() -> None:
    with pytest.raises(InputError, match="no observations"):
        choose_threads(lambda _: print, [], cores=2, rounds=1, iterations_per_round=1)


@given(cores=st.integers(1, 256), serial=st.floats(0.01, 1), clock_ms=st.floats(1, 50))
def test_the_choice_is_within_the_machine_and_every_step_to_it_paid(cores: int, serial: float, clock_ms: float) -> None:
    found, asked = chosen(cores, lambda threads: clock_ms * (serial + (1 - serial) / threads))
    assert 1 <= found.threads <= cores
    assert asked == sorted(set(asked))
    assert all(speedup >= WORTH for threads, speedup in found.speedups.items() if threads <= found.threads)
