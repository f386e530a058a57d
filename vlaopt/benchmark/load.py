"""Load for a measurement: processes that keep cores and memory as busy as a robot's planners and cameras do.

A robot is never idle, and what shares its caches, memory and clocks shows in the tail of a policy's latency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from vlaopt import isolated

FRAME = (1080, 1920, 3)
"""Bytes of one picture of a camera: full HD in three colours, 6 MiB."""
FRAMES = 8
"""A ring of pictures, 48 MiB: more than the caches of a robot's processors hold, so that copies reach its memory."""
VALUES = 1 << 14
"""Numbers of one step of a planner, 128 KiB: they stay in a core's own cache."""
STEPS = 2
"""Steps of the planner for each picture: between half and twice the time of its copy, by the machine's memory."""
READY_S = 60.0


@dataclass(frozen=True)
class Load:
    """Processes at work."""

    workers: Sequence[isolated.Beside]

    @property
    def processes(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(worker.process for worker in self.workers)

    def lost(self) -> int:
        """How many have ended, which none should."""
        return sum(not worker.running for worker in self.workers)


@contextmanager
def busy(count: int, seed: int = 0) -> Iterator[Load]:
    """`count` processes at work while the body runs, each on one core all the time; all gone afterwards.

    Each copies pictures through memory, as a camera's driver and its pipeline do, and between them sorts, samples and
    transforms numbers, as a planner does; seeds decide which. Raises StageError when one dies or does not get ready,
    such as for want of memory.
    """
    with ExitStack() as stack:
        workers = [
            stack.enter_context(isolated.beside(_work, seed, place, what=f"load process {place + 1} of {count}"))
            for place in range(count)
        ]
        for worker in workers:
            worker.heard(READY_S)
        yield Load(workers)


def _work(caller: isolated.Caller, seed: int, place: int) -> None:
    isolated.leave_real_time()
    rng = np.random.default_rng((seed, place))
    pictures = rng.integers(0, 256, (FRAMES, *FRAME), np.uint8)
    values = rng.random(VALUES)
    caller()
    while not caller.asks(0.0):
        source, target = rng.choice(FRAMES, 2, replace=False)
        np.copyto(pictures[target], pictures[source])
        for _ in range(STEPS):
            _plan(values, rng)


def _plan(values: np.ndarray[tuple[int], np.dtype[np.float64]], rng: np.random.Generator) -> None:
    """One step: draw candidates, transform them, order them by cost. Elementwise, so on one core whatever the BLAS."""
    rng.random(out=values)
    np.sin(values, out=values)
    values.sort()
