"""How many threads pay: measured in turns, from one thread upwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlaopt.benchmark.compare import SECONDS, Sample, interleave
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock

WORTH = 1.1
"""More threads must be this many times as fast: what they take, the robot's other programs lack."""


@dataclass(frozen=True)
class ThreadChoice:
    """The number of threads that pays, and what was seen: how many times as fast each count is as the one before."""

    threads: int
    speedups: dict[int, float]


def choose_threads(
    opened: Callable[[int], Callable[[Sample], object]],
    samples: Sequence[Sample],
    *,
    cores: int,
    rounds: int,
    iterations_per_round: int,
    seconds: float = SECONDS,
    clock: Clock = SYSTEM_CLOCK,
) -> ThreadChoice:
    """Double the threads, up to `cores`, for as long as that pays; `opened` makes the call that runs on so many.

    No more than two calls are open at once. Raises InputError when there are no samples.
    """
    threads, call = 1, opened(1)
    speedups: dict[int, float] = {}
    while (more := min(2 * threads, cores)) > threads:
        wider = opened(more)
        turns = interleave(
            {"now": call, "more": wider},
            samples,
            rounds=rounds,
            iterations_per_round=iterations_per_round,
            seconds=seconds,
            clock=clock,
        )
        speedups[more] = round(turns.median_ms("now") / turns.median_ms("more"), 3)
        if speedups[more] < WORTH:
            break
        threads, call = more, wider
    return ThreadChoice(threads, speedups)
