"""A timeline has one value of each name for every moment, and none where there was none."""

from __future__ import annotations

from vlaopt.benchmark.timeline import timeline
from vlaopt.machine.state import State

S = 1_000_000_000


def test_readings_become_series_on_the_axis_of_the_ticks() -> None:
    found = timeline(
        [
            (S, State(clocks_mhz={"cpu": 2201.6}, temperatures_c={"tj": 50.12345}, gpu_memory_mib=512.0)),
            (3 * S, State(power_w={"VDD_IN": 30.0}, throttling=("CPU too hot", "CPU too hot"))),
            (4 * S, State(clocks_mhz={"cpu": 1100.0}, throttling=("GPU too hot",))),
            (5 * S, State(throttling=("CPU too hot",))),
        ],
        first_tick_ns=2 * S,
        period_s=0.5,
    )
    assert found is not None
    assert found.seconds == (-1.0, 1.0, 2.0, 3.0)
    assert found.series == {
        "clock_mhz.cpu": (2201.6, None, 1100.0, None),
        "gpu_memory_mib": (512.0, None, None, None),
        "power_w.VDD_IN": (None, 30.0, None, None),
        "temperature_c.tj": (50.123, None, None, None),
    }
    assert found.throttling == {"CPU too hot": 0.5, "GPU too hot": 0.25}


def test_no_readings_are_no_timeline() -> None:
    assert timeline([], first_tick_ns=0, period_s=0.5) is None
