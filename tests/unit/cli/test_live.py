"""The promise: what a live view says of the ticks is what the record will say, and of the machine what is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from tests.unit.benchmark.conftest import FakeClock
from vlaopt.benchmark.schedule import run_ticks
from vlaopt.cli.live import Machine, Ticks, frame, line
from vlaopt.machine.state import State

MS = 1_000_000


def an_hour() -> Ticks:
    """Twelve minutes of an hour at 20 Hz: 10 ms each but for a stall that drops a tick, and 40 ticks that got lost."""
    ticks = Ticks(20, 3600)
    for tick in range(14_400):
        if not 8000 <= tick < 8040:
            ticks.add(tick, {9000: 85 * MS, 9001: 35 * MS, 14_399: 12 * MS}.get(tick, 10 * MS))
    return ticks


def a_hot_machine() -> Machine:
    machine = Machine({"energy_j": "no RAPL counters", "clocks_mhz": "no cpufreq"})
    machine.add(10.0, State(energy_j={"package-0": 100.0}, throttling=("CPU too hot",)))
    machine.add(
        12.0,
        State(
            clocks_mhz={"cpu": 3400.0, "gpu0 sm": 1980.0},
            temperatures_c={"tj": 71.25},
            power_w={"VDD_IN": 30.0},
            energy_j={"package-0": 125.0},
            throttling=("GPU too hot",),
        ),
    )
    return machine


def test_a_frame_tells_ticks_and_machine() -> None:
    assert frame(an_hour(), a_hot_machine()).splitlines() == [
        "at 20 Hz      0:12:00 of 1:00:00, 0:48:00 left",
        "last 22.9 s   p50 10.000 ms, p99 10.000 ms",
        "ticks         14360, 1 missed, 1 dropped; worst 85.000 ms, deadline 50 ms",
        "left out      40, which came faster than they were read here",
        "clocks        cpu 3400, gpu0 sm 1980 MHz",
        "temperature   tj 71.25 °C",
        "power         package-0 12.5, VDD_IN 30 W",
        "throttling    GPU too hot, CPU too hot (before)",
    ]


def test_what_is_not_known_is_said_with_its_reason() -> None:
    ticks = Ticks(20, 60)
    ticks.add(0, 10 * MS)
    assert frame(ticks, Machine({"energy_j": "no RAPL counters"})).splitlines() == [
        "at 20 Hz      0:00:00 of 0:01:00, 0:00:59 left",
        "last 0.05 s   p50 — (needs 8 ticks), p99 — (needs 459 ticks)",
        "ticks         1, 0 missed, 0 dropped; worst 10.000 ms, deadline 50 ms",
        "clocks        not available",
        "temperature   not available",
        "power         not available: no RAPL counters",
        "throttling    none told",
    ]


def test_a_line_holds_what_is_known() -> None:
    assert line(an_hour(), a_hot_machine()) == (
        "at 20 Hz: 0:12:00 of 1:00:00, 0:48:00 left; last 22.9 s: p50 10.000 ms, p99 10.000 ms; "
        "ticks: 14360, 1 missed, 1 dropped; worst 85.000 ms, deadline 50 ms; "
        "left out: 40, which came faster than they were read here; clocks: cpu 3400, gpu0 sm 1980 MHz; "
        "temperature: tj 71.25 °C; power: package-0 12.5, VDD_IN 30 W; throttling: GPU too hot, CPU too hot (before)"
    )


@given(
    some.lists(some.one_of(some.floats(0.001, 5), some.floats(5, 300)), min_size=1, max_size=80),
    some.sampled_from([3.0, 7.0, 20.0, 1000.0]),
)
def test_misses_drops_and_the_worst_are_those_of_the_schedule(latencies_ms: list[float], hz: float) -> None:
    clock, waiting = FakeClock(), iter(latencies_ms)

    def call() -> int:
        clock.work(next(waiting))
        return clock.now_ns()

    told: list[int] = []
    happened = run_ticks(call, ticks=len(latencies_ms), hz=hz, clock=clock, on_tick=told.append)
    ticks = Ticks(hz, len(latencies_ms) / hz)
    for tick, latency_ns in enumerate(told):
        ticks.add(tick, latency_ns)
    samples_ms = [round(latency_ns / 1e6, 3) for latency_ns in happened.latencies_ns]
    assert ticks.dropped == len(happened.dropped)
    assert ticks.missed == sum(sample > 1000 / hz for sample in samples_ms)
    assert ticks.worst_ms == max(samples_ms)


def test_rolling_figures_are_of_ten_seconds_or_of_as_many_ticks_as_a_p99_needs() -> None:
    fast, slow, seldom = Ticks(1000, 60), Ticks(1, 3600), Ticks(0.1, 86_400)
    for tick in range(30_000):
        fast.add(tick, (5 if tick < 20_000 else 1) * MS)
    for tick in range(1000):
        slow.add(tick, (5 if tick < 541 else 1) * MS)
    assert fast.rows()["last 10 s"] == "p50 1.000 ms, p99 1.000 ms"
    assert slow.rows()["last 459 s"] == "p50 1.000 ms, p99 1.000 ms"
    for tick in range(1000):
        seldom.add(tick, MS)
    assert seldom.rows()["last 4590 s"] == "p50 1.000 ms, p99 1.000 ms"
    assert fast.worst_ms == 5.0


def test_ticks_apart_are_not_taken_for_a_dropped_one() -> None:
    ticks = Ticks(10, 60)
    ticks.add(0, 250 * MS)
    ticks.add(2, 50 * MS)  # ends with tick 0, and the one between them was never told
    assert ticks.dropped == 0
    ticks.add(3, 20 * MS)
    assert ticks.rows()["left out"].startswith("1, which")


def test_a_counter_tells_no_power_before_its_second_reading() -> None:
    machine = Machine({})
    machine.add(5.0, State(energy_j={"package-0": 100.0}))
    assert machine.unknown()["power"] == "not available"
    machine.add(5.5, State(energy_j={"package-0": 110.0, "package-1": 50.0}))
    assert machine.rows()["power"] == "package-0 20 W"


def test_many_sensors_are_told_by_their_number() -> None:
    machine = Machine({})
    machine.add(1.0, State(temperatures_c={f"zone{index}": 40.0 for index in range(6)}))
    assert machine.rows()["temperature"] == "zone0 40, zone1 40, zone2 40, zone3 40 °C, 2 more"
