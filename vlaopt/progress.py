"""How long work tells that it moves. The command line draws it; everything else only speaks to `Progress`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Receives what a stage is doing."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A piece of work of `total` items (None: unknown), open for the length of the `with` block."""
        ...

    def still(self) -> AbstractContextManager[Callable[[str], None]]:
        """Nothing is drawn for the length of the block, where it would disturb what is measured.

        The function it gives says what comes next, at once and never while a clock runs.
        """
        ...


class Task(Protocol):
    """One open piece of work."""

    def advance(self, items: int = 1) -> None:
        """`items` more are done."""
        ...


class SilentTask:
    """A task that nobody watches."""

    def advance(self, items: int = 1) -> None:
        """Nothing to show."""


class Silent:
    """Progress that nobody watches: the default of the Python API."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A task that shows nothing."""
        return nullcontext(SilentTask())

    def still(self) -> AbstractContextManager[Callable[[str], None]]:
        """Nothing is drawn anyway, and what comes next is not said."""
        return nullcontext(lambda phase: None)


def track(progress: Progress, label: str, items: Iterable[Item], total: int | None = None) -> Iterator[Item]:
    """`items` one by one, each counted in a task called `label` once the loop's body is through with it."""
    with progress.task(label, total) as task:
        for item in items:
            yield item
            task.advance()


@contextmanager
def phases(progress: Progress) -> Iterator[Callable[[str, int, int], None]]:
    """A function to be told of phases, `(name, step, steps)`: the one told of last is shown as a task."""
    with ExitStack() as open_task:
        task: Task = SilentTask()
        shown: tuple[str, int, int] = ("", 0, 0)

        def tell(phase: str, step: int, steps: int) -> None:
            nonlocal task, shown
            if (phase, steps) != (shown[0], shown[2]) or step < shown[1]:
                open_task.close()
                task, shown = open_task.enter_context(progress.task(phase, steps)), (phase, 0, steps)
            task.advance(step - shown[1])
            shown = (phase, step, steps)

        yield tell
