"""The schedule does not wait for the policy, and nothing a late policy costs is left out."""

from __future__ import annotations

import time
import tracemalloc
from bisect import bisect_left
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.benchmark.schedule import SystemClock, Ticks, run_ticks

MS = 1_000_000


class Stepped:
    """A clock that stands still but for sleep and work."""

    def __init__(self) -> None:
        self.time_ns = 0

    def now_ns(self) -> int:
        return self.time_ns

    def sleep_until(self, moment_ns: int) -> None:
        self.time_ns = max(self.time_ns, moment_ns)


def ticks_of(latencies_ms: list[float], hz: float, on_tick: Callable[[int], None] | None = None) -> Ticks:
    """As many ticks as latencies; the n-th call that is started takes the n-th."""
    clock, remaining = Stepped(), iter(latencies_ms)

    def call() -> int:
        clock.time_ns += round(next(remaining) * MS)
        return clock.time_ns

    return run_ticks(call, ticks=len(latencies_ms), hz=hz, clock=clock, on_tick=on_tick)


def by_hand(call_ns: Sequence[int], intended_ns: Sequence[int]) -> tuple[list[int], list[int]]:
    """Latency of each tick and the dropped ones, when the n-th call that is started takes `call_ns[n]`.

    A tick is started unless the next one is already due, and one that is not waits for the end of the next that is.
    """
    ends_ns: dict[int, int] = {}
    free_ns, last = 0, len(intended_ns) - 1
    for tick, moment_ns in enumerate(intended_ns):
        if tick == last or free_ns < intended_ns[tick + 1]:
            free_ns = max(free_ns, moment_ns) + call_ns[len(ends_ns)]
            ends_ns[tick] = free_ns
    started = list(ends_ns)
    latencies = [ends_ns[started[bisect_left(started, tick)]] - moment_ns for tick, moment_ns in enumerate(intended_ns)]
    return latencies, [tick for tick in range(last + 1) if tick not in ends_ns]


@given(st.lists(st.floats(0.1, 200), min_size=1, max_size=80), st.sampled_from([10.0, 30.0, 50.0, 333.0, 1000.0]))
def test_any_latencies_give_the_ticks_counted_by_hand(latencies: list[float], hz: float) -> None:
    happened = ticks_of(latencies, hz)
    intended_ns = [round(tick * 1e9 / hz) for tick in range(len(latencies))]
    told, dropped = by_hand([round(latency * MS) for latency in latencies], intended_ns)
    assert list(happened.latencies_ns) == told
    assert list(happened.dropped) == dropped


def test_a_stall_costs_every_tick_it_covered() -> None:
    happened = ticks_of([5, 80, 5, 5, 5, 5, 5, 5], hz=50)
    # intended 20 ms apart: tick 1 stalls until 80 ms after its moment, when tick 5 becomes due
    assert list(happened.dropped) == [2, 3, 4]
    assert [latency / MS for latency in happened.latencies_ns] == [5, 80, 65, 45, 25, 5, 5, 5]


def test_a_tick_started_late_but_before_the_next_one_counts_from_its_intended_moment() -> None:
    happened = ticks_of([5, 30, 5, 5], hz=50)
    assert list(happened.dropped) == []
    assert [latency / MS for latency in happened.latencies_ns] == [5, 30, 15, 5]
    assert len(happened.wake_ups_ns) == 3


def test_a_policy_slower_than_the_rate_drops_ticks_and_the_run_still_ends_on_time() -> None:
    happened = ticks_of([50.0] * 20, hz=50)
    assert len(happened.latencies_ns) == 20
    assert len(happened.dropped) > 10
    assert max(happened.latencies_ns) < 150 * MS


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.sampled_from([10.0, 30.0, 50.0, 333.0]))
def test_every_intended_tick_has_a_latency_and_dropped_ones_miss_the_period(latencies: list[float], hz: float) -> None:
    happened = ticks_of(latencies, hz)
    assert len(happened.latencies_ns) == len(latencies)
    assert all(happened.latencies_ns[tick] > 1e9 / hz - 1 for tick in happened.dropped)
    assert len(latencies) - 1 not in happened.dropped
    assert min(happened.latencies_ns) >= round(min(latencies) * MS)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.sampled_from([10.0, 30.0, 50.0, 333.0]))
def test_each_latency_is_told_once_in_order(latencies: list[float], hz: float) -> None:
    told: list[int] = []
    happened = ticks_of(latencies, hz, on_tick=told.append)
    assert told == list(happened.latencies_ns)


def test_hours_at_1_khz_cost_a_few_bytes_and_the_same_time_for_each_tick() -> None:
    def run(ticks: int) -> tuple[float, float]:
        """Bytes kept and seconds taken by each tick, of which every tenth stalls."""
        tracemalloc.start()
        begin_s = time.process_time()
        happened = ticks_of([25 if tick % 10 == 5 else 0.5 for tick in range(ticks)], hz=1000)
        spent_s = time.process_time() - begin_s
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(happened.latencies_ns) == ticks
        return kept / ticks, spent_s / ticks

    run(1000)
    (_, short_s), (kept_bytes, long_s) = run(2_000), run(100_000)
    assert kept_bytes < 24
    # a quadratic step would make it fifty times as long
    assert long_s < 5 * short_s


def test_the_system_clock_wakes_at_the_moment_and_not_before() -> None:
    clock = SystemClock()
    late_ns = []
    for _ in range(20):
        moment_ns = clock.now_ns() + 2 * MS
        clock.sleep_until(moment_ns)
        late_ns.append(clock.now_ns() - moment_ns)
    assert min(late_ns) >= 0
    # a single wake-up may meet another process; the best ones show what the spin is for
    assert min(late_ns) < 100_000
    clock.sleep_until(clock.now_ns() - MS)


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_setting_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    real: Callable[[], float] = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + jump_s) * 1e9))
    clock = SystemClock()
    begin_ns = clock.now_ns()
    happened = run_ticks(clock.now_ns, ticks=5, hz=200, clock=clock)
    assert clock.now_ns() - begin_ns < 2_000 * MS
    assert all(0 <= latency < 1_000 * MS for latency in happened.latencies_ns)
