"""Which of two is faster, and measuring several alternately so that the machine's moods fall on all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlaopt.benchmark.record import BenchRecord
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import FLOATS, bootstrap_median_difference, mann_whitney, median
from vlaopt.errors import InputError

Answer = Literal["FASTER", "SLOWER", "SAME", "UNCLEAR"]
SAME_WITHIN = 0.02
SIGNIFICANT = 0.01
FEWEST = 10


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


def interleave(
    calls: Mapping[str, Callable[[Mapping[str, Any]], object]],
    observations: Sequence[Mapping[str, Any]],
    *,
    rounds: int,
    iterations_per_round: int,
    warmup: int = 10,
    seed: int = 0,
    clock: Clock = SYSTEM_CLOCK,
) -> dict[str, FLOATS]:
    """Latencies in ms of each call, shape (rounds · iterations_per_round,), measured in turns within one process.

    Each round runs all calls, in an order drawn anew; all calls see the same observations in the same order. Each call
    first runs `warmup` times unmeasured. Raises InputError when there are no observations.
    """
    if not observations:
        raise InputError("no observations to measure with")
    for call in calls.values():
        for iteration in range(warmup):
            call(observations[iteration % len(observations)])
    rng = np.random.default_rng(seed)
    names = list(calls)
    samples_ms: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        for place in rng.permutation(len(names)):
            name = names[place]
            call = calls[name]
            for iteration in range(round_ * iterations_per_round, (round_ + 1) * iterations_per_round):
                observation = observations[iteration % len(observations)]
                start_ns = clock.now_ns()
                call(observation)
                samples_ms[name].append((clock.now_ns() - start_ns) / 1e6)
    return {name: np.asarray(samples, np.float64) for name, samples in samples_ms.items()}
