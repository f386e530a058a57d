"""Progress on a terminal: a bar for each open task, and a line for each whole piece of work once it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Task as Row
from rich.text import Text

from vlaopt.progress import Task

SLOW_S = 1.0
"""Work that took less leaves no line."""


class _Count(ProgressColumn):
    """`82/200, 22 s left`; nothing for a task whose length is unknown."""

    def render(self, task: Row) -> Text:
        if task.total is None:
            return Text()
        left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
        return Text(f"{task.completed:.0f}/{task.total:.0f}{left}")


class _Bar:
    def __init__(self, bars: Progress, identity: TaskID) -> None:
        self._bars, self._identity = bars, identity

    def advance(self, items: int = 1) -> None:
        self._bars.advance(self._identity, items)


class Terminal:
    """Bars that vanish when their task is done; an outermost task leaves a line with the seconds it took."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._depth = 0

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        """A bar for the length of the block."""
        identity = self._bars.add_task("  " * self._depth + label, total=total)
        self._depth += 1
        started = time.monotonic()
        try:
            yield _Bar(self._bars, identity)
        finally:
            self._depth -= 1
            self._bars.remove_task(identity)
        if self._depth == 0 and (seconds := time.monotonic() - started) > SLOW_S:
            self._bars.console.print(f"{label}: {seconds:.1f} s")

    @contextmanager
    def still(self) -> Iterator[Callable[[str], None]]:
        """Take the bars away, with the thread that draws them; what comes next is a line that stays."""
        self._bars.stop()
        try:
            yield self._bars.console.print
        finally:
            self._bars.start()


@contextmanager
def drawn(console: Console) -> Iterator[Terminal]:
    """Bars on `console` for the length of the block."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        _Count(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield Terminal(bars)
