"""What a person sees: progress on stderr, results on stdout. No bars and no colour where nobody watches."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vlaopt.progress import Silent, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vlaopt.cli.bars import Terminal

SLOW_S = 1.0


class _Silence:
    def advance(self, items: int = 1) -> None:
        """A log needs no items."""


class Log:
    """Progress as one line for each task that took more than a second."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        started = time.monotonic()
        yield _Silence()
        seconds = time.monotonic() - started
        if seconds > SLOW_S:
            note(f"{label}: {f'{total} in ' if total else ''}{seconds:.1f} s")

    def still(self) -> AbstractContextManager[Callable[[str], None]]:
        """A log draws nothing; what comes next is a line."""
        return nullcontext(note)


@contextmanager
def watched(quiet: bool = False) -> Iterator[Silent | Terminal | Log]:
    """The progress that suits stderr: bars on a terminal, lines elsewhere, nothing when `quiet`."""
    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield Log()
    else:
        from vlaopt.cli.bars import drawn

        with drawn(console(sys.stderr)) as bars:
            yield bars


def console(stream: Any = None) -> Console:
    """A console on `stream` (stdout by default) that draws colour only on a terminal."""
    from rich.console import Console

    target = stream or sys.stdout
    width = None if target.isatty() else 140
    # Cells hold shapes, paths and messages: a bracket in them is a bracket, not rich's markup.
    return Console(file=target, highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def give(text: str) -> None:
    """The result, on stdout."""
    print(text)  # noqa: T201


def give_words(text: str) -> None:
    """A sentence of the result, on stdout; on a terminal its lines end between words."""
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, 40)
        text = textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    give(text)


def give_json(value: Any) -> None:
    """The result as JSON, on stdout."""
    give(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))


def give_table(table: Table) -> None:
    """The result as a table, on stdout; where nobody watches, without blanks at the ends of its lines."""
    drawing = console()
    if sys.stdout.isatty():
        drawing.print(table)
        return
    with drawing.capture() as captured:
        drawing.print(table)
    give("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns in `right` are aligned to the right, cells of those in `whole` are never broken."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole
        )
    return made


def size(count: int) -> str:
    """Bytes as people read them: 1.2 MB."""
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
