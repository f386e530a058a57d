"""Which of two is faster, and measuring several alternately so that the machine's moods fall on all of them alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from vlaopt.benchmark.record import BenchRecord
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import FLOATS, bootstrap_median_difference, mann_whitney, median
from vlaopt.errors import InputError

Sample = TypeVar("Sample")
"""What a call takes: an observation, alone or with its noise."""
Answer = Literal["FASTER", "SLOWER", "SAME", "UNCLEAR"]
SAME_WITHIN = 0.02
SIGNIFICANT = 0.01
FEWEST = 10
SECONDS = 5.0
"""What measuring one call in turns may cost; those that are faster are called as often as asked."""
FEWEST_ROUNDS = 3
FEWEST_WARMUPS = 2
"""The first call alone says little of how long the others take."""


@dataclass(frozen=True)
class Comparison:
    """B held against A. `answer` is what B is; `ratio` is median B / median A; the 99 % interval is of B - A."""

    median_a_ms: float
    median_b_ms: float
    ratio: float
    difference_low_ms: float
    difference_high_ms: float
    p_value: float
    answer: Answer

    @property
    def speedup(self) -> float:
        """How many times faster B is than A."""
        return self.median_a_ms / self.median_b_ms


def compare(a: Sequence[float] | FLOATS, b: Sequence[float] | FLOATS, *, seed: int = 0) -> Comparison:
    """Hold latencies `b` against `a`, both in ms: one per process launch, or interleaved iterations of one process.

    SAME: the whole interval lies within 2 % of median A. FASTER or SLOWER: it lies on one side of zero and
    Mann-Whitney agrees (p < 0.01). UNCLEAR otherwise. Raises InputError for fewer than ten samples a side, or one that
    is not above 0.
    """
    for name, samples in (("A", a), ("B", b)):
        if len(samples) < FEWEST:
            raise InputError(f"{len(samples)} measurements of {name}, {FEWEST} are needed to compare")
        if not (np.isfinite(samples).all() and np.min(samples) > 0):
            raise InputError(f"a latency of {name} is not a number above 0")
    median_a, median_b = median(a), median(b)
    low, high = bootstrap_median_difference(a, b, seed=seed)
    p_value = mann_whitney(a, b)
    return Comparison(
        median_a, median_b, median_b / median_a, low, high, p_value, _answer(low / median_a, high / median_a, p_value)
    )


def _answer(low: float, high: float, p_value: float) -> Answer:
    if low >= -SAME_WITHIN and high <= SAME_WITHIN:
        return "SAME"
    if p_value < SIGNIFICANT and high < 0:
        return "FASTER"
    if p_value < SIGNIFICANT and low > 0:
        return "SLOWER"
    return "UNCLEAR"


def check_comparable(a: BenchRecord, b: BenchRecord) -> None:
    """Raises InputError naming what differs when the records come from other machines, policies or control rates."""
    if a.subject.policy != b.subject.policy:
        raise InputError(f"records of different policies: {a.subject.policy} and {b.subject.policy}")
    if a.settings.hz != b.settings.hz:
        raise InputError(f"records at different control rates: {a.settings.hz:g} and {b.settings.hz:g} Hz")
    if a.environment.fingerprint() != b.environment.fingerprint():
        one, other = a.environment.comparable(), b.environment.comparable()
        differing = [f"{name} {one[name]!r} and {other[name]!r}" for name in one if one[name] != other[name]]
        raise InputError(
            f"records from different environments: {'; '.join(differing)}", hint="measure both again on one machine"
        )


@dataclass(frozen=True)
class Turns:
    """What `interleave` measured: latencies in ms of each call, shape (rounds · iterations_per_round,)."""

    samples_ms: Mapping[str, FLOATS]
    rounds: int
    iterations_per_round: int
    warmups: Mapping[str, int]

    def median_ms(self, name: str) -> float:
        """The median of one call, to 0.1 µs."""
        return round(median(self.samples_ms[name]), 4)

    @property
    def count(self) -> int:
        """Samples of each call."""
        return self.rounds * self.iterations_per_round


def interleave(
    calls: Mapping[str, Callable[[Sample], object]],
    samples: Sequence[Sample],
    *,
    rounds: int,
    iterations_per_round: int,
    seconds: float = SECONDS,
    fewest_rounds: int = FEWEST_ROUNDS,
    warmup: int = 10,
    seed: int = 0,
    clock: Clock = SYSTEM_CLOCK,
) -> Turns:
    """Measure all calls in turns within one process, on the same samples in the same order.

    Each round runs all calls, in an order drawn anew. Each call first runs `warmup` times unmeasured. Where the slowest
    call would then take more than `seconds`, all run fewer times: see `affordable`. Raises InputError when there are no
    samples.
    """
    if not samples:
        raise InputError("no observations to measure with")
    warmed = {name: _warm_up(call, samples, warmup, seconds, clock) for name, call in calls.items()}
    slowest_s = max((least_s for _, least_s in warmed.values()), default=0.0)
    rounds, iterations = affordable(
        slowest_s,
        rounds=rounds,
        iterations_per_round=iterations_per_round,
        seconds=seconds,
        fewest_rounds=fewest_rounds,
    )
    rng = np.random.default_rng(seed)
    names = list(calls)
    latencies_ms: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        for place in rng.permutation(len(names)):
            name = names[place]
            for iteration in range(round_ * iterations, (round_ + 1) * iterations):
                latencies_ms[name].append(_timed_s(calls[name], samples[iteration % len(samples)], clock) * 1e3)
    return Turns(
        {name: np.asarray(found, np.float64) for name, found in latencies_ms.items()},
        rounds,
        iterations,
        {name: count for name, (count, _) in warmed.items()},
    )


def affordable(
    call_s: float, *, rounds: int, iterations_per_round: int, seconds: float, fewest_rounds: int = FEWEST_ROUNDS
) -> tuple[int, int]:
    """At most so many rounds and iterations of a call of `call_s` seconds that they take `seconds` in all.

    Rounds are kept before iterations, for they spread the machine's moods; `fewest_rounds` there always are.
    """
    if call_s * rounds * iterations_per_round <= seconds:
        return rounds, iterations_per_round
    calls = int(seconds / call_s)
    if calls >= rounds:
        return rounds, calls // rounds
    return min(rounds, max(fewest_rounds, calls)), 1


def _warm_up(
    call: Callable[[Sample], object], samples: Sequence[Sample], most: int, seconds: float, clock: Clock
) -> tuple[int, float]:
    """How often the call ran unmeasured, for about a quarter of `seconds` at most, and its least seconds."""
    spent, least = 0.0, math.inf
    count = 0
    while count < min(most, FEWEST_WARMUPS) or (count < most and spent <= seconds / 4):
        took = _timed_s(call, samples[count % len(samples)], clock)
        spent, least, count = spent + took, min(least, took), count + 1
    return count, least


def _timed_s(call: Callable[[Sample], object], sample: Sample, clock: Clock) -> float:
    start_ns = clock.now_ns()
    call(sample)
    return (clock.now_ns() - start_ns) / 1e9
