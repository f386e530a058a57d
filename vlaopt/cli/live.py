"""A paced run as a person sees it while it goes on: its ticks so far and the machine, as words. Draws nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np

from vlaopt.benchmark.statistics import FLOATS, minimum_samples, nearest_rank
from vlaopt.cli.record import KINDS, MOST_SERIES
from vlaopt.machine.state import State

WINDOW_S = 10.0
"""What the rolling figures are of; longer where a p99 needs more ticks than that."""
LABEL = 13


class Ticks:
    """The ticks of a paced run at `hz` for `duration_s` that were told so far."""

    def __init__(self, hz: float, duration_s: float) -> None:
        self.hz, self.duration_s = hz, duration_s
        self.passed = self.told = self.missed = self.dropped = 0
        self.worst_ms = 0.0
        self._recent_ms: deque[float] = deque(maxlen=max(math.ceil(WINDOW_S * hz), minimum_samples(0.99)))
        self._end_ns: int | None = None

    def add(self, tick: int, latency_ns: int) -> None:
        """Tick `tick`, counted from 0, later than those before; its latency is from the intended moment.

        One that ended with the next was dropped: its latency runs to the end of the call it waited for.
        """
        end_ns = round(tick * 1e9 / self.hz) + latency_ns
        self.dropped += tick == self.passed and end_ns == self._end_ns
        self._end_ns = end_ns
        latency_ms = round(latency_ns / 1e6, 3)
        self.missed += latency_ms > 1000 / self.hz
        self.worst_ms = max(self.worst_ms, latency_ms)
        self._recent_ms.append(latency_ms)
        self.passed = tick + 1
        self.told += 1

    def rows(self) -> dict[str, str]:
        """What is told of them, by label."""
        passed_s = self.passed / self.hz
        left_s = max(0.0, self.duration_s - passed_s)
        recent_ms = np.sort(np.asarray(self._recent_ms, np.float64))
        rows = {
            f"at {self.hz:g} Hz": f"{_clock(passed_s)} of {_clock(self.duration_s)}, {_clock(left_s)} left",
            f"last {_seconds(len(recent_ms) / self.hz)} s": f"p50 {_stated(recent_ms, 0.5)}, "
            f"p99 {_stated(recent_ms, 0.99)}",
            "ticks": f"{self.told}, {self.missed} missed, {self.dropped} dropped; "
            f"worst {self.worst_ms:.3f} ms, deadline {1000 / self.hz:g} ms",
        }
        if self.told < self.passed:
            rows["left out"] = f"{self.passed - self.told}, which came faster than they were read here"
        return rows


class Machine:
    """The machine as its states tell it; `missing` are the reasons of its probes, by field of `State`."""

    def __init__(self, missing: Mapping[str, str]) -> None:
        self._missing = missing
        self._moment_s = 0.0
        self._state = State()
        self._power_w: Mapping[str, float] = {}
        self._throttled: dict[str, None] = {}

    def add(self, moment_s: float, state: State) -> None:
        """The state at a moment later than that of the one before. A counter of energy gives power from its second."""
        seconds, before_j = moment_s - self._moment_s, self._state.energy_j
        counted_w = {
            name: (now_j - before_j[name]) / seconds for name, now_j in state.energy_j.items() if name in before_j
        }
        self._power_w = {**counted_w, **state.power_w}
        self._moment_s, self._state = moment_s, state
        self._throttled.update(dict.fromkeys(state.throttling))

    def rows(self) -> dict[str, str]:
        """What is told of it, by label."""
        state = self._state
        series = {"clock_mhz": state.clocks_mhz, "temperature_c": state.temperatures_c, "power_w": self._power_w}
        rows = {KINDS[kind][0]: _series(values, KINDS[kind][1]) for kind, values in series.items() if values}
        before = [reason for reason in self._throttled if reason not in state.throttling]
        told = [*state.throttling, *(f"{reason} (before)" for reason in before)]
        return {**rows, **({"throttling": ", ".join(told)} if told else {})}

    def unknown(self) -> dict[str, str]:
        """What is not told of it, by label, and why."""
        fields = {"clocks": "clocks_mhz", "temperature": "temperatures_c", "power": "energy_j"}
        rows = {label: f"not available{_because(self._missing.get(field))}" for label, field in fields.items()}
        told = self.rows()
        return {label: text for label, text in {**rows, "throttling": "none told"}.items() if label not in told}


def frame(ticks: Ticks, machine: Machine) -> str:
    """All of it, a line for each label."""
    rows = {**ticks.rows(), **machine.rows(), **machine.unknown()}
    return "\n".join(f"{label:<{LABEL}} {text}" for label, text in rows.items())


def line(ticks: Ticks, machine: Machine) -> str:
    """What is known, in one line."""
    return "; ".join(f"{label}: {text}" for label, text in {**ticks.rows(), **machine.rows()}.items())


def _stated(ordered_ms: FLOATS, q: float) -> str:
    needed = minimum_samples(q)
    return f"— (needs {needed} ticks)" if len(ordered_ms) < needed else f"{nearest_rank(ordered_ms, q):.3f} ms"


def _series(values: Mapping[str, float], unit: str) -> str:
    told = ", ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:MOST_SERIES])
    more = f", {len(values) - MOST_SERIES} more" if len(values) > MOST_SERIES else ""
    return f"{told} {unit}{more}"


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def _clock(seconds: float) -> str:
    whole = math.floor(seconds + 1e-9)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
