"""The clock and the open-loop schedule of control ticks. Knows nothing of policies or statistics."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
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

    first_ns: the moment of the first intended tick.
    latencies_ns: one per intended tick, dropped ones included, in order.
    dropped: the ticks that were never started.
    wake_ups_ns: how late the schedule woke for each tick it had to wait for.
    """

    first_ns: int
    latencies_ns: Sequence[int]
    dropped: Sequence[int]
    wake_ups_ns: Sequence[int]


def run_ticks(
    call: Callable[[], int],
    *,
    ticks: int,
    hz: float,
    clock: Clock,
    on_tick: Callable[[int], None] | None = None,
) -> Ticks:
    """Start `call`, which returns when it ended in ns of `clock`, at `ticks` moments 1/hz apart, kept up with or not.

    Tick k is intended at k/hz after the first, and its latency runs from that moment to the end of its call, so a late
    start counts. A tick whose turn comes only when the next one is already due is dropped, as on a robot that then
    takes the newer observation: it is not started, and its latency runs to the end of the next call that is, which is
    how long the robot waited. So a stall costs every tick it covered. The last tick is never dropped.

    `on_tick` is told each latency once it is known, when the call is over. A tick keeps 8 bytes, or 16 that had to be
    waited for, or was dropped, so that hours at 1 kHz fit.
    """
    first_ns = clock.now_ns() + round(1e9 / hz)

    def intended_ns(tick: int) -> int:
        return first_ns + round(tick * 1e9 / hz)

    latencies_ns, dropped, wake_ups_ns = array("q"), array("q"), array("q")
    for tick in range(ticks):
        now_ns = clock.now_ns()
        if tick + 1 < ticks and now_ns >= intended_ns(tick + 1):
            dropped.append(tick)
            continue
        if now_ns < intended_ns(tick):
            clock.sleep_until(intended_ns(tick))
            wake_ups_ns.append(clock.now_ns() - intended_ns(tick))
        end_ns = call()
        while len(latencies_ns) <= tick:
            latencies_ns.append(end_ns - intended_ns(len(latencies_ns)))
            if on_tick is not None:
                on_tick(latencies_ns[-1])
    return Ticks(first_ns, latencies_ns, dropped, wake_ups_ns)
