"""One measurement: warm up, back-to-back, paced; actions checked as it runs; a verdict. No sample is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vlaopt.benchmark import energy, environment, load, verdict
from vlaopt.benchmark.record import Actions, BackToBack, BenchRecord, BenchSettings, Paced, Subject, WakeUp
from vlaopt.benchmark.sampling import Readings, Sampler
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock, Ticks, run_ticks
from vlaopt.benchmark.statistics import Distribution, median, summarise
from vlaopt.benchmark.timeline import timeline
from vlaopt.errors import InputError
from vlaopt.machine.system import ROOT

Array = np.ndarray[Any, np.dtype[Any]]
Sample = Any
"""What a call takes: an observation, alone or with its noise."""
Call = Callable[[Sample], Array]
Difference = Callable[[Array, Array], float]
Result = TypeVar("Result")

WARMUP_WINDOW = 25
WARMUP_DRIFT = 0.02
WARMUP_MOST = 2000
IDLE_S = 2.0
"""For how long the machine's power is read while the policy rests."""
OVERHEAD_TURNS = 500


def measure(
    call: Call,
    observations: Sequence[Sample],
    *,
    settings: BenchSettings,
    expected: Sequence[Array] | None = None,
    tolerance: float | Difference | None = None,
    subject: Subject | None = None,
    machine: environment.Environment | None = None,
    sampler: Sampler | None = None,
    on_tick: Callable[[int], None] | None = None,
    clock: Clock = SYSTEM_CLOCK,
    root: Path = ROOT,
    on_progress: Callable[[str], None] | None = None,
) -> BenchRecord:
    """Measure `call`, from an observation in host memory to an action chunk in host memory.

    observations: distinct ones, each as `call` takes it, cycled in an order drawn from the seed; expected: the chunk
    of each.
    tolerance: largest absolute difference allowed, or a function of (actions, expected) that is above 1 if they differ.
    machine: where this runs (read from `root` when None). sampler: one that runs, for the timeline and the energy.
    on_tick: told the latency in ns of each paced tick when its call is over. on_progress: told the phase before it
    starts. Nothing is drawn while a clock runs. The settings' load works from before the warm-up to the end.

    Raises InputError for no observations, a number of expected chunks that differs, or expected without tolerance, and
    StageError for a load that does not get going.
    """
    tell = on_progress or (lambda phase: None)
    check = ActionCheck(expected, _difference(observations, expected, tolerance))
    machine = machine or environment.read_environment(root=root)
    order = np.random.default_rng(settings.seed).permutation(len(observations)).tolist()
    calls = _Calls(call, observations, order, check, clock)
    with load.busy(settings.load, settings.seed) as working:
        tell("idle")
        idle = _rest(sampler, clock)
        tell("warm-up")
        warmed, stable = _warm_up(calls, settings)
        overhead_us = _overhead_us(calls)
        check.checked = 0
        tell("back-to-back")
        back_to_back = _back_to_back(calls, settings.back_to_back_s)
        tell("paced")
        own = (*working.processes, *(sampler.processes if sampler else ()))
        before = environment.read_activity(root, own)
        happened, readings = _watched(sampler, lambda: _paced(calls, settings, on_tick))
        after = environment.read_activity(root, own)
        load_lost = working.lost()
    paced = _account(happened, settings.hz)
    around = _surroundings(
        machine, sampler, readings, before, after, first_tick_ns=happened.first_ns, load_lost=load_lost
    )
    evidence = verdict.Evidence(
        paced=paced,
        back_to_back=back_to_back,
        around=around,
        warmed=warmed,
        stable=stable,
        observations=len(observations),
        overhead_us=overhead_us,
        actions_wrong=check.wrong(),
        actions_checked=check.checked,
    )
    answer, reasons = verdict.judge(evidence)
    return BenchRecord(
        subject=subject or Subject(),
        environment=machine,
        settings=settings,
        verdict=answer,
        reasons=reasons,
        warmup_iterations=warmed,
        paced=paced,
        back_to_back=back_to_back,
        energy=energy.per_chunk(sampler, readings, idle, chunks=paced.ticks - len(paced.dropped)),
        overhead_us=overhead_us,
        others_cpu_share=around.others_cpu_share,
        actions=Actions(checked=check.checked, worst_difference=check.worst()),
        timeline=around.timeline,
    )


class ActionCheck:
    """Holds the actions of a run against the expected ones; without those it still wants finite numbers."""

    def __init__(self, expected: Sequence[Array] | None, difference: Difference) -> None:
        self.expected = expected
        self.difference = difference
        self.checked = 0
        self._worst = 0.0
        self._worst_index = 0

    def look(self, index: int, actions: Array) -> None:
        """Take note of the actions given for observation `index`."""
        if self.expected is None:
            difference = 0.0 if np.isfinite(actions).all() else math.inf
        else:
            self.checked += 1
            wanted = self.expected[index]
            difference = self.difference(actions, wanted) if actions.shape == wanted.shape else math.inf
        # written so that NaN, which compares false with everything, counts as worst
        if not difference <= self._worst:
            self._worst, self._worst_index = (difference if math.isfinite(difference) else math.inf), index

    def worst(self) -> float | None:
        """The worst difference in units of the tolerance, if there is a finite one."""
        return self._worst if self.checked and math.isfinite(self._worst) else None

    def wrong(self) -> str | None:
        """How the actions differ, or None when they do not."""
        if not math.isfinite(self._worst):
            return f"observation {self._worst_index} gave actions that are not finite or of another shape"
        if self._worst > 1:
            return f"observation {self._worst_index} is off by {self._worst:.3g} times the tolerance"
        return None


class _Calls:
    """The policy called on one observation after another. Actions are checked when the clock has been read."""

    def __init__(
        self, call: Call, observations: Sequence[Sample], order: Sequence[int], check: ActionCheck, clock: Clock
    ) -> None:
        self.call = call
        self.observations = observations
        self.order = order
        self.check = check
        self.clock = clock
        self.count = 0

    def once(self) -> tuple[int, int]:
        """One call; when it started and ended, in ns of the clock."""
        index = self.order[self.count % len(self.order)]
        self.count += 1
        observation = self.observations[index]
        start_ns = self.clock.now_ns()
        actions = self.call(observation)
        end_ns = self.clock.now_ns()
        self.check.look(index, actions)
        return start_ns, end_ns


def _difference(
    observations: Sequence[Sample], expected: Sequence[Array] | None, tolerance: float | Difference | None
) -> Difference:
    if not observations:
        raise InputError("no observations to measure with")
    if expected is not None and len(expected) != len(observations):
        raise InputError(f"{len(expected)} expected action chunks for {len(observations)} observations")
    if expected is None:
        return lambda actions, wanted: 0.0
    if callable(tolerance):
        return tolerance
    if tolerance is None or not 0 < tolerance < math.inf:
        raise InputError(f"tolerance {tolerance}: a number above 0 is needed to check actions")
    limit = float(tolerance)
    return lambda actions, wanted: float(np.abs(actions - wanted).max()) / limit


def _warm_up(calls: _Calls, settings: BenchSettings) -> tuple[int, bool]:
    """Call until the median of 25 calls is within 2 % of the 25 before: the number of calls, and whether it was."""
    latencies: list[int] = []
    begin_ns = calls.clock.now_ns()
    while len(latencies) < WARMUP_MOST and calls.clock.now_ns() - begin_ns < settings.warmup_cap_s * 1e9:
        start_ns, end_ns = calls.once()
        latencies.append(end_ns - start_ns)
        if len(latencies) >= settings.warmup_iterations:
            before = median(latencies[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
            if abs(median(latencies[-WARMUP_WINDOW:]) - before) <= WARMUP_DRIFT * before:
                return len(latencies), True
    return len(latencies), False


def _overhead_us(calls: _Calls) -> float:
    """What a turn of the loop costs around a call that does nothing, action check included: the median of turns, µs."""
    expected = calls.check.expected
    actions = expected[0] if expected else np.zeros((1, 1), np.float32)
    check = ActionCheck([actions] if expected else None, calls.check.difference)
    empty = _Calls(lambda observation: actions, calls.observations, [0], check, calls.clock)
    turns_us = []
    for _ in range(OVERHEAD_TURNS):
        start_ns = calls.clock.now_ns()
        empty.once()
        turns_us.append((calls.clock.now_ns() - start_ns) / 1e3)
    return round(median(turns_us), 3)


def _back_to_back(calls: _Calls, seconds: float) -> BackToBack:
    samples_ms: list[float] = []
    spent_ns = 0
    until_ns = calls.clock.now_ns() + round(seconds * 1e9)
    while not samples_ms or calls.clock.now_ns() < until_ns:
        start_ns, end_ns = calls.once()
        spent_ns += end_ns - start_ns
        samples_ms.append(_milliseconds(end_ns - start_ns))
    latency = summarise(samples_ms)
    return BackToBack(
        latency_ms=latency,
        jitter_ms=_jitter(latency),
        throughput_hz=round(len(samples_ms) * 1e9 / max(1, spent_ns), 3),
        samples_ms=tuple(samples_ms),
    )


def _paced(calls: _Calls, settings: BenchSettings, on_tick: Callable[[int], None] | None) -> Ticks:
    ticks = max(1, math.ceil(settings.duration_s * settings.hz - 1e-9))
    return run_ticks(lambda: calls.once()[1], ticks=ticks, hz=settings.hz, clock=calls.clock, on_tick=on_tick)


def _account(happened: Ticks, hz: float) -> Paced:
    samples_ms = tuple(_milliseconds(latency_ns) for latency_ns in happened.latencies_ns)
    deadline_ms = 1000 / hz
    misses = sum(sample > deadline_ms for sample in samples_ms)
    latency = summarise(samples_ms)
    wake_ups_us = [wake_up_ns / 1e3 for wake_up_ns in happened.wake_ups_ns]
    return Paced(
        latency_ms=latency,
        jitter_ms=_jitter(latency),
        deadline_ms=deadline_ms,
        ticks=len(samples_ms),
        misses=misses,
        miss_rate=misses / len(samples_ms),
        dropped=tuple(happened.dropped),
        wake_up=WakeUp(
            p50_us=median(wake_ups_us) if wake_ups_us else None, max_us=max(wake_ups_us) if wake_ups_us else None
        ),
        samples_ms=samples_ms,
    )


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _jitter(latency: Distribution) -> float | None:
    """p99 - p50, where both can be stated."""
    if latency.p99.value is None or latency.p50.value is None:
        return None
    return round(latency.p99.value - latency.p50.value, 3)


def _watched(sampler: Sampler | None, work: Callable[[], Result]) -> tuple[Result, Readings]:
    """What `work` gives, and the states of the machine from just before it to just after it."""
    if sampler is None:
        return work(), []
    sampler.read()
    first = max(0, len(sampler.states) - 1)
    result = work()
    sampler.read()
    return result, sampler.states[first:]


def _rest(sampler: Sampler | None, clock: Clock) -> Readings:
    """States while the policy rests; no time is spent where no energy is told."""
    if sampler is None or not sampler.board:
        return []
    return _watched(sampler, lambda: clock.sleep_until(clock.now_ns() + round(IDLE_S * 1e9)))[1]


def _surroundings(
    machine: environment.Environment,
    sampler: Sampler | None,
    readings: Readings,
    before: environment.Activity | None,
    after: environment.Activity | None,
    *,
    first_tick_ns: int,
    load_lost: int,
) -> verdict.Surroundings:
    return verdict.Surroundings(
        governor=machine.loose_governor(),
        unlocked=any(state.held is False for _, state in readings),
        others_cpu_share=after.others_since(before) if after and before else None,
        throttle_events=after.throttled - before.throttled if after and before else 0,
        timeline=timeline(readings, first_tick_ns=first_tick_ns, period_s=sampler.period_s) if sampler else None,
        gpu=machine.gpu,
        gpu_programs=max((state.gpu_processes or 0 for _, state in readings), default=0),
        load_lost=load_lost,
        unread=sampler.failure if sampler else None,
    )
