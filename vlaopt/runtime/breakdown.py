"""Where the time of a chunk goes: components, by the clock of their device too, the processors, and the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vlaopt.backends import DeviceTime, Timing
from vlaopt.benchmark.compare import interleave
from vlaopt.benchmark.record import Breakdown, ComponentTime
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import median, minimum_samples
from vlaopt.runtime.golden import Sample, of_sample
from vlaopt.runtime.loop import run_loop
from vlaopt.runtime.policy import Policy
from vlaopt.runtime.timing import TimedSession

TURNS = 500
FEWEST_TURNS = minimum_samples(0.5)

_TOGETHER, _APART, _ON_DEVICE = "together", "apart", "on the device"


def break_down(
    policy: Policy, samples: Sequence[Sample], *, seconds: float = 3.0, clock: Clock = SYSTEM_CLOCK
) -> Breakdown:
    """Medians over the same chunks, run in turns as the policy does it and with its components one by one.

    That is for about `seconds`, 8 chunks at the least and 500 at the most, warm-up apart. Where a device has a clock,
    the chunks run once more for it alone, since it costs the host time. Timing a call reads the host's clock twice,
    less than a microsecond, which counts as the loop's. Samples have the noise that the policy takes. Raises
    InputError when there are none.
    """
    apart, on_device = _Apart(policy, clock), _OnDevice(policy)
    ways = {_TOGETHER: of_sample(policy.predict_chunk), _APART: apart.run}
    if on_device.clocks:
        ways[_ON_DEVICE] = on_device.run
    turns = interleave(
        ways,
        samples,
        rounds=TURNS,
        iterations_per_round=1,
        seconds=seconds / len(ways),
        fewest_rounds=FEWEST_TURNS,
        clock=clock,
    )
    chunks = apart.chunks[turns.warmups[_APART] :]
    timed = on_device.chunks[turns.warmups.get(_ON_DEVICE, 0) :]
    return Breakdown(
        chunks=len(chunks),
        whole_ms=_median(chunk.whole_ms for chunk in chunks),
        together_ms=turns.median_ms(_TOGETHER),
        components={
            name: _component(
                [chunk.calls_ms[name] for chunk in chunks],
                [chunk[name] for chunk in timed] if name in on_device.clocks else [],
            )
            for name in policy.sessions
        },
        processors_ms=_median(chunk.processors_ms for chunk in chunks),
        loop_ms=_median(chunk.loop_ms for chunk in chunks),
    )


@dataclass(frozen=True)
class _Chunk:
    """What one chunk took: as a whole, its processors, and every call of each component, in ms."""

    whole_ms: float
    processors_ms: float
    calls_ms: Mapping[str, Sequence[float]]

    @property
    def loop_ms(self) -> float:
        return self.whole_ms - self.processors_ms - sum(map(sum, self.calls_ms.values()))


class _Apart:
    """The policy with its components one by one, each between two readings of the clock."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self.chunks: list[_Chunk] = []
        self._policy = policy
        self._clock = clock
        self._sessions = {name: TimedSession(session, clock) for name, session in policy.sessions.items()}

    def run(self, sample: Sample) -> None:
        observation, noise = sample
        for session in self._sessions.values():
            session.times_ms = []
        started_ns = self._clock.now_ns()
        tensors = self._policy.processors.prepare(observation)
        prepared_ns = self._clock.now_ns()
        outputs = run_loop(self._policy.spec, self._sessions, tensors, noise)
        looped_ns = self._clock.now_ns()
        self._policy.processors.actions(outputs)
        ended_ns = self._clock.now_ns()
        self.chunks.append(
            _Chunk(
                whole_ms=(ended_ns - started_ns) / 1e6,
                processors_ms=(prepared_ns - started_ns + ended_ns - looped_ns) / 1e6,
                calls_ms={name: session.times_ms for name, session in self._sessions.items()},
            )
        )


class _OnDevice:
    """The policy with its components one by one, timed by the device. `clocks` are those of sessions that have one."""

    def __init__(self, policy: Policy) -> None:
        self.chunks: list[Mapping[str, DeviceTime]] = []
        self.clocks = {name: session for name, session in policy.sessions.items() if isinstance(session, Timing)}
        self._policy = policy
        self._sessions = {name: TimedSession(session) for name, session in policy.sessions.items()}

    def run(self, sample: Sample) -> None:
        observation, noise = sample
        tensors = self._policy.processors.prepare(observation)
        with ExitStack() as stack:
            runs = {name: stack.enter_context(clock.device_times()) for name, clock in self.clocks.items()}
            run_loop(self._policy.spec, self._sessions, tensors, noise)
        self.chunks.append({name: _sum(times) for name, times in runs.items()})


def _sum(runs: Sequence[DeviceTime]) -> DeviceTime:
    return DeviceTime(sum(run.compute_ms for run in runs), sum(run.copies_ms for run in runs))


def _component(calls_ms: Sequence[Sequence[float]], on_device: Sequence[DeviceTime]) -> ComponentTime:
    """From its calls in every chunk, and what those took on the device, if that has a clock."""
    return ComponentTime(
        calls=median([len(calls) for calls in calls_ms]),
        wall_ms=_median(map(sum, calls_ms)),
        device_ms=_median(chunk.compute_ms for chunk in on_device) if on_device else None,
        copies_ms=_median(chunk.copies_ms for chunk in on_device) if on_device else None,
    )


def _median(values_ms: Iterable[float]) -> float:
    """To 0.1 µs."""
    return round(median(list(values_ms)), 4)
