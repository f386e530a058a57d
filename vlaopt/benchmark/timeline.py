"""Readings of the machine as a record keeps them: one series for each name, on the time axis of the paced run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vlaopt.benchmark.record import Timeline
from vlaopt.benchmark.sampling import Readings
from vlaopt.machine.state import State

DIGITS = 3


def timeline(readings: Readings, *, first_tick_ns: int, period_s: float) -> Timeline | None:
    """The timeline of readings; None where there are none."""
    if not readings:
        return None
    moments = [_values(state) for _, state in readings]
    names = sorted({name for values in moments for name in values})
    throttling = Counter(reason for _, state in readings for reason in set(state.throttling))
    return Timeline(
        period_s=period_s,
        seconds=tuple(round((moment_ns - first_tick_ns) / 1e9, DIGITS) for moment_ns, _ in readings),
        series={name: tuple(values.get(name) for values in moments) for name in names},
        throttling={reason: round(count / len(readings), DIGITS) for reason, count in sorted(throttling.items())},
    )


def _values(state: State) -> dict[str, float]:
    groups: dict[str, Mapping[str, float]] = {
        "clock_mhz": state.clocks_mhz,
        "temperature_c": state.temperatures_c,
        "power_w": state.power_w,
    }
    values = {f"{group}.{name}": value for group, told in groups.items() for name, value in told.items()}
    if state.gpu_memory_mib is not None:
        values["gpu_memory_mib"] = state.gpu_memory_mib
    return {name: round(value, DIGITS) for name, value in values.items()}
