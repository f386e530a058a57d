"""The promise: of the phases that a builder tells of, the one told of last is shown, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest

from vlaopt.progress import Task, phases


class Watched:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        watched, done = self.seen, 0

        class Counted:
            def advance(self, items: int = 1) -> None:
                nonlocal done
                done += items

        watched.append(f"{label} of {total}")
        try:
            yield Counted()
        finally:
            watched.append(f"{label} at {done}")

    def still(self) -> AbstractContextManager[Callable[[str], None]]:
        return nullcontext(self.seen.append)


def test_one_phase_at_a_time_is_shown() -> None:
    progress = Watched()
    with phases(progress) as tell:
        tell("Building", 0, 2)
        tell("Compiling", 0, 3)
        tell("Compiling", 2, 3)
        tell("Compiling", 3, 3)
        tell("Building", 1, 2)
        tell("Compiling", 0, 3)
    shown = ["Building of 2", "Building at 0", "Compiling of 3", "Compiling at 3", "Building of 2", "Building at 1"]
    assert progress.seen == [*shown, "Compiling of 3", "Compiling at 0"]


def test_the_phase_that_was_open_is_closed_by_an_error() -> None:
    progress = Watched()
    with pytest.raises(ValueError, match="stopped"), phases(progress) as tell:
        tell("Building", 1, 2)
        raise ValueError("stopped")
    assert progress.seen == ["Building of 2", "Building at 1"]
