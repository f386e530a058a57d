"""What each component takes inside its whole policy: alone, its weights would stay in the processor's cache as they
never do on a robot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vlaopt.backends import Session, Value
from vlaopt.benchmark.compare import interleave
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import nearest_rank
from vlaopt.runtime.golden import Sample, of_sample
from vlaopt.runtime.policy import Policy


def component_times(
    variants: Mapping[str, Mapping[str, Session]],
    assembled: Callable[[Mapping[str, Session]], Policy],
    samples: Sequence[Sample],
    *,
    rounds: int,
    iterations: int,
    quantile: float = 0.5,
) -> dict[str, dict[str, float]]:
    """Milliseconds that every component takes of a chunk, by variant; the variants are measured in turns.

    That is the `quantile` of its calls, by default their median, times how often a chunk calls it. `assembled` makes a
    policy of a variant's sessions; `rounds` and `iterations` are those of `interleave`.
    """
    watched = {
        label: {name: TimedSession(session) for name, session in sessions.items()}
        for label, sessions in variants.items()
    }
    calls: dict[str, Callable[[Sample], object]] = {
        label: of_sample(assembled(sessions).predict_chunk) for label, sessions in watched.items()
    }
    turns = interleave(calls, samples, rounds=rounds, iterations_per_round=iterations)
    return {
        label: {
            name: session.chunk_ms(turns.warmups[label], turns.count, quantile) for name, session in sessions.items()
        }
        for label, sessions in watched.items()
    }


class TimedSession:
    """A session that keeps the time of its calls, in ms. What runs components at once runs those one by one."""

    def __init__(self, session: Session, clock: Clock = SYSTEM_CLOCK) -> None:
        self._session = session
        self._clock = clock
        self.inputs, self.outputs = session.inputs, session.outputs
        self.times_ms: list[float] = []

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        started_ns = self._clock.now_ns()
        outputs = self._session.run(feeds, resident)
        self.times_ms.append((self._clock.now_ns() - started_ns) / 1e6)
        return outputs

    def chunk_ms(self, warmups: int, measured: int, quantile: float) -> float:
        """From its calls in the `measured` chunks that came after `warmups`."""
        per_chunk = len(self.times_ms) / (warmups + measured)
        calls = np.sort(np.asarray(self.times_ms[int(per_chunk * warmups) :], np.float64))
        return nearest_rank(calls, quantile) * per_chunk
