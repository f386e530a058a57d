"""Which of two is faster, and measuring several alternately so that the machine's moods fall on all of them alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Literal, TypeVar

import numpy as np

from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import FLOATS, bootstrap_median_difference, bootstrap_rounds, mann_whitney, median
from vlaopt.errors import InputError

Sample = TypeVar("Sample")
"""What a call takes: an observation, alone or with its noise."""
Interval = Callable[..., tuple[float, float]]
"""Of median B - median A, from samples of both and a confidence."""
Answer = Literal["FASTER", "SLOWER", "SAME", "UNCLEAR"]
SAME_WITHIN = 0.02
"""A share of the latency; a smaller difference is nothing that a control loop feels."""
DIFFERENT_AT, SAME_AT = 0.99, 0.90
"""Confidence of the interval that must exclude no difference, and of the one that must lie within SAME_WITHIN.

The second is that of two one-sided tests at 5 % each (Schuirmann 1987, "A comparison of the two one-sided tests
procedure and the power approach", J. Pharmacokinet. Biopharm. 15).
"""
SIGNIFICANT = 0.01
FEWEST = 10
SECONDS = 5.0
"""What measuring one call in turns may cost; those that are faster are called as often as asked."""
FEWEST_ROUNDS = 3
FEWEST_WARMUPS = 2
"""The first call alone says little of how long the others take."""


@dataclass(frozen=True)
class Comparison:
    """B held against A: `answer` is what B is, `ratio` median B / median A, `difference_ms` median B - median A.

    The intervals are of 99 %.
    """

    median_a_ms: float
    median_b_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    difference_ms: float
    difference_low_ms: float
    difference_high_ms: float
    p_value: float
    answer: Answer

    @property
    def speedup(self) -> float:
        """How many times as fast as A B is."""
        return self.median_a_ms / self.median_b_ms


def compare(
    a: Sequence[float] | FLOATS, b: Sequence[float] | FLOATS, *, unseen: float = 0.0, seed: int = 0
) -> Comparison:
    """Hold latencies `b` against `a`, both in ms and independent of each other: one per launch of a process.

    SAME: with 90 % confidence the medians are within 2 % of each other. FASTER or SLOWER: with 99 % they differ, and
    Mann-Whitney agrees (p < 0.01). UNCLEAR otherwise. `unseen` is the standard deviation of what the samples cannot
    tell, as a share of the latency: it widens the intervals of the ratio.

    Where launches of one policy differ by 1 % (standard deviation), 20 a side say SAME of equals in 99 of 100 trials,
    and FASTER or SLOWER of what is 5 % apart in all; at 2 % they say SAME in 60 and UNCLEAR in the rest, at 3 % in 10:
    then more launches tell, 60 a side and 150.

    Raises InputError for fewer than ten samples a side, or one that is not above 0.
    """
    return _held(a, b, partial(bootstrap_median_difference, seed=seed), unseen)


def compare_rounds(a: Sequence[float] | FLOATS, b: Sequence[float] | FLOATS, *, seed: int = 0) -> Comparison:
    """As `compare` for `a[i]` and `b[i]` of the same round i, one soon after the other.

    What the machine's clocks, heat and other programs do to both from round to round then does not blur the answer.
    Raises InputError also where the sides have not as many rounds.
    """
    if len(a) != len(b):
        raise InputError(f"{len(a)} rounds of A and {len(b)} of B")
    return _held(a, b, partial(bootstrap_rounds, seed=seed), 0.0)


def _held(a: Sequence[float] | FLOATS, b: Sequence[float] | FLOATS, interval: Interval, unseen: float) -> Comparison:
    for name, samples in (("A", a), ("B", b)):
        if len(samples) < FEWEST:
            raise InputError(f"{len(samples)} measurements of {name}, {FEWEST} are needed to compare")
        if not (np.isfinite(samples).all() and np.min(samples) > 0):
            raise InputError(f"a latency of {name} is not a number above 0")

    def ratio_within(confidence: float) -> tuple[float, float]:
        """Of median B / median A: the logarithm of a median is the median of the logarithms."""
        low, high = interval(np.log(a), np.log(b), confidence=confidence)
        wider = NormalDist().inv_cdf((1 + confidence) / 2) * unseen
        return math.exp(low - wider), math.exp(high + wider)

    median_a, median_b = median(a), median(b)
    low, high = interval(a, b, confidence=DIFFERENT_AT)
    ratio, p_value = ratio_within(DIFFERENT_AT), mann_whitney(a, b)
    return Comparison(
        median_a_ms=median_a,
        median_b_ms=median_b,
        ratio=median_b / median_a,
        ratio_low=ratio[0],
        ratio_high=ratio[1],
        difference_ms=median_b - median_a,
        difference_low_ms=low,
        difference_high_ms=high,
        p_value=p_value,
        answer=_answer(ratio_within(SAME_AT), ratio, p_value),
    )


def _answer(same: tuple[float, float], different: tuple[float, float], p_value: float) -> Answer:
    """From the ratio's interval at SAME_AT and at DIFFERENT_AT."""
    if same[0] >= 1 / (1 + SAME_WITHIN) and same[1] <= 1 + SAME_WITHIN:
        return "SAME"
    if p_value >= SIGNIFICANT or different[0] <= 1 <= different[1]:
        return "UNCLEAR"
    return "FASTER" if different[1] < 1 else "SLOWER"


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
