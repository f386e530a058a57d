"""The clock and the open-loop schedule of control ticks. Knows nothing of policies or statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

SPIN_NS = 200_000


class Clock(Protocol):
    """A monotonic clock. Tests bring their own."""

    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment; never goes back."""
        ...

    def sleep_until(self, moment_ns: int) -> None:
        """Returns once `now_ns()` has reached `moment_ns`; at once when it already has."""
        ...


class SystemClock:
    """The machine's monotonic clock: setting the wall clock does not move it."""

    def now_ns(self) -> int:
        """`time.perf_counter_ns`."""
        return time.perf_counter_ns()

    def sleep_until(self, moment_ns: int) -> None:
        """Sleeps, then spins for the last 200 µs: a timer alone wakes 50 µs and more too late."""
        remaining_ns = moment_ns - time.perf_counter_ns() - SPIN_NS
        if remaining_ns > 0:
            time.sleep(remaining_ns / 1e9)
        while time.perf_counter_ns() < moment_ns:
            pass


SYSTEM_CLOCK = SystemClock()


@dataclass(frozen=True)
class Ticks:
    """What happened at the intended ticks. Times in nanoseconds.

    latencies_ns: one per intended tick, dropped ones included, in order.
    dropped: the ticks that were never started.
    wake_ups_ns: how late the schedule woke for each tick it had to wait for.
    """

    latencies_ns: tuple[int, ...]
    dropped: tuple[int, ...]
    wake_ups_ns: tuple[int, ...]


def run_ticks(call: Callable[[], int], *, ticks: int, hz: float, clock: Clock) -> Ticks:
    """Start `call`, which returns when it ended in ns of `clock`, at `ticks` moments 1/hz apart, kept up with or not.

    Tick k is intended at k/hz after the first, and its latency runs from that moment to the end of its call, so a late
    start counts. A tick whose turn comes only when the next one is already due is dropped, as on a robot that then
    takes the newer observation: it is not started, and its latency runs to the end of the next call that is, which is
    how long the robot waited. So a stall costs every tick it covered. The last tick is never dropped.
    """
    first_ns = clock.now_ns() + round(1e9 / hz)
    intended_ns = [first_ns + round(tick * 1e9 / hz) for tick in range(ticks)]
    latencies_ns: list[int] = []
    dropped: list[int] = []
    wake_ups_ns: list[int] = []
    for tick in range(ticks):
        now_ns = clock.now_ns()
        if tick + 1 < ticks and now_ns >= intended_ns[tick + 1]:
            dropped.append(tick)
            continue
        if now_ns < intended_ns[tick]:
            clock.sleep_until(intended_ns[tick])
            wake_ups_ns.append(clock.now_ns() - intended_ns[tick])
        end_ns = call()
        while len(latencies_ns) <= tick:
            latencies_ns.append(end_ns - intended_ns[len(latencies_ns)])
    return Ticks(tuple(latencies_ns), tuple(dropped), tuple(wake_ups_ns))
