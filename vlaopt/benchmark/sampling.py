"""Reads what the machine does while a policy is measured, in a process of its own. Knows no policy and no record.

No lock of the interpreter is shared with what is measured, and no clock runs while the two talk.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType

from vlaopt import isolated
from vlaopt.errors import VlaoptError
from vlaopt.machine.state import Probe, State
from vlaopt.machine.state.probes import merged, missing, open_probes

PERIOD_S = 0.5
OPENING_S = 30.0
"""What opening the probes may take: a driver that wakes up needs seconds."""
ANSWER_S = 10.0
"""What an answer may take: a reading, and the states since the last one."""
NICE = 10

Opener = Callable[[], Sequence[Probe]]
Readings = Sequence[tuple[int, State]]
"""States with their moments in ns of `time.perf_counter_ns`, which is one clock for all processes; in order."""


class Sampler:
    """States of the machine, one in every period, read while the body of `with` runs.

    opened: gives the probes, in the other process; a function of a module. After `read`, `states` are all so far.
    `board` are the names in states that together are the machine's energy, `sources` the probes that tell those, and
    `missing` why a field of `State` is not told. A sampler that fails ends no measurement: `failure` says why there are
    no more states.
    """

    def __init__(self, period_s: float = PERIOD_S, opened: Opener = open_probes) -> None:
        self.period_s = period_s
        self.states: list[tuple[int, State]] = []
        self.board: tuple[str, ...] = ()
        self.sources: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}
        self.failure: str | None = None
        self._opened = opened
        self._beside: isolated.Beside | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Sampler:
        try:
            self._beside = self._stack.enter_context(
                isolated.beside(_sample, self._opened, self.period_s, what="the reader of the machine's state")
            )
            self.sources, self.board, self.missing = self._beside.heard(OPENING_S)
        except VlaoptError as error:
            self._give_up(error)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._beside = None

    @property
    def processes(self) -> tuple[int, ...]:
        """The numbers of the processes whose CPU time is the measurement's own."""
        return (self._beside.process,) if self._beside else ()

    def read(self) -> None:
        """Have the state read now, and take over all states since the last time."""
        if self._beside is None:
            return
        try:
            self.states.extend(*self._beside.ask(ANSWER_S))
        except VlaoptError as error:
            self._give_up(error)

    def _give_up(self, error: VlaoptError) -> None:
        self.failure = str(error)
        self._stack.close()
        self._beside = None


def _sample(caller: isolated.Caller, opened: Opener, period_s: float) -> None:
    """Read a state at a moment drawn from each period: at even ones it would meet the same phase of every tick."""
    step_aside()
    probes = opened()
    telling = [probe for probe in probes if probe.board]
    board = tuple(name for probe in telling for name in probe.board)
    caller(tuple(probe.name for probe in telling), board, missing(probes))
    draw = random.Random(0)
    states: list[tuple[int, State]] = []
    period_begins_s = time.perf_counter()
    while True:
        moment_s = period_begins_s + draw.random() * period_s
        while caller.asks(max(0.0, moment_s - time.perf_counter())):
            caller([*states, _read(probes)])
            states = []
        states.append(_read(probes))
        # a period that a slow reading or a busy machine took whole has none
        period_begins_s += period_s * max(1.0, (time.perf_counter() - period_begins_s) // period_s)


def _read(probes: Sequence[Probe]) -> tuple[int, State]:
    """The state, and the middle of the time that reading it took."""
    begin_ns = time.perf_counter_ns()
    state = merged(probes)
    return (begin_ns + time.perf_counter_ns()) // 2, state


def step_aside() -> None:
    """Leave the processor to what is measured: its cores, where those are pinned, and its scheduling class."""
    os.nice(NICE)
    if sys.platform != "linux":
        return
    isolated.leave_real_time()
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
    if others:
        with suppress(OSError):
            os.sched_setaffinity(0, others)
