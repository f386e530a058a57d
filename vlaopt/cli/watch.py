"""A live view of a paced run, drawn by a process of its own: what is measured only leaves its ticks in a pipe.

The cursor stays visible and the terminal's modes stay as they are, so that nothing need be restored, whatever ends it.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vlaopt import isolated
from vlaopt.benchmark.sampling import step_aside
from vlaopt.cli import terminal
from vlaopt.cli.live import Machine, Ticks, frame, line
from vlaopt.errors import EnvironmentProblem
from vlaopt.machine.state.probes import merged, missing, open_probes
from vlaopt.progress import Progress, Task

STDERR = 2
FRAME_S, STATE_S, LINE_S = 0.25, 1.0, 10.0
"""How often ticks are taken and drawn, the machine is read, and a line is written where nobody watches."""
OPENING_S, CLOSING_S = 30.0, 10.0
TICK = struct.Struct("=qq")
"""A tick in the pipe: its number from 0, its latency in ns. A pipe takes it whole or not at all: it is that short."""


class Watch:
    """A progress whose `tick` shows each paced tick, on a view that ends before anything else is said.

    A view that fails ends no measurement: it is said why there is none.
    """

    def __init__(self, progress: Progress, view: isolated.Beside, pipe: int) -> None:
        self._progress, self._view, self._pipe = progress, view, pipe
        self._ticks = 0
        self._ended = False

    def tick(self, latency_ns: int) -> None:
        """Show the latency of the next tick. Never waits: what a full pipe has no room for, the view counts as such."""
        try:  # noqa: SIM105 - on cold caches `suppress` takes longer than all the rest
            os.write(self._pipe, TICK.pack(self._ticks, latency_ns))
        except OSError:  # no room, or a view that is gone: `end` says so
            pass
        self._ticks += 1

    def end(self) -> None:
        """Have the last of it drawn, where there is any; once."""
        if self._ended or not self._ticks:
            return
        self._ended = True
        try:
            (shown,) = self._view.ask(CLOSING_S)
        except Exception as error:  # whatever went wrong with a view, what was measured is worth more
            terminal.note(f"the live view has ended: {error}")
            return
        if shown < self._ticks:
            terminal.note(f"the live view left out {self._ticks - shown} of {self._ticks} ticks; the record has all")

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A task of the progress beneath."""
        return self._progress.task(label, total)

    @contextmanager
    def still(self) -> Iterator[Callable[[str], None]]:
        """As that of the progress beneath; what comes after the ticks is said below the view."""
        with self._progress.still() as say:

            def say_below(phase: str) -> None:
                self.end()
                say(phase)

            try:
                yield say_below
            finally:
                self.end()


@contextmanager
def shown(progress: Progress, *, hz: float, duration_s: float, output: int = STDERR) -> Iterator[Watch]:
    """A view of a paced run at `hz` for `duration_s` on the open file `output`; it appears with the first tick.

    Raises EnvironmentProblem where that is closed, and StageError for a view that cannot be started.
    """
    with ExitStack() as stack, ExitStack() as theirs:
        try:
            drawn_on = os.dup(output)
        except OSError as error:
            raise EnvironmentProblem(f"nothing can be shown on stderr: {error.strerror}") from error
        theirs.callback(os.close, drawn_on)
        there, here = os.pipe()
        theirs.callback(os.close, there)
        stack.callback(os.close, here)
        for end in (there, here):
            os.set_blocking(end, False)
        view = stack.enter_context(
            isolated.beside(_show, there, drawn_on, hz, duration_s, what="the live view", descriptors=(there, drawn_on))
        )
        theirs.close()  # a tick then fails once the view is gone
        view.heard(OPENING_S)
        yield Watch(progress, view, here)


def _show(caller: isolated.Caller, pipe: int, output: int, hz: float, duration_s: float) -> None:
    """Draw what comes through the pipe until asked, then tell how many ticks there were.

    The pipe is looked at now and then: waiting for it would have every tick wake this process.
    """
    step_aside()
    probes = open_probes()
    ticks = Ticks(hz, duration_s)
    machine = Machine(missing(probes))
    with os.fdopen(output, "w", errors="replace") as stream:
        surface = _Screen(stream) if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" else _Log(stream)
        machine.add(time.monotonic(), merged(probes))
        next_state_s = time.monotonic() + STATE_S
        caller()
        while not caller.asks(FRAME_S):
            if not _take(pipe, ticks):
                continue  # a frame that says nothing new would be drawn over the shell of a run that was stopped there
            if time.monotonic() >= next_state_s:
                machine.add(time.monotonic(), merged(probes))
                next_state_s = time.monotonic() + STATE_S
            surface.draw(ticks, machine)
        _take(pipe, ticks)
        surface.close(ticks, machine)
    caller(ticks.told)


def _take(pipe: int, ticks: Ticks) -> bool:
    """Add what is in the pipe; whether there was anything."""
    before = ticks.told
    with suppress(BlockingIOError):  # it is empty
        while data := os.read(pipe, 4096 * TICK.size):
            for tick, latency_ns in TICK.iter_unpack(data):
                ticks.add(tick, latency_ns)
    return ticks.told > before


class _Screen:
    """A terminal: each frame is drawn over the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = _Steady(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def draw(self, ticks: Ticks, machine: Machine) -> None:
        columns, lines = os.get_terminal_size(self._stream.fileno())
        self._console.size = (columns or 80, lines or 24)  # some pseudo-terminals have no size
        self._live.start()
        self._live.update(Text(frame(ticks, machine), no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self, ticks: Ticks, machine: Machine) -> None:
        self.draw(ticks, machine)
        self._live.stop()


class _Steady(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor alone: whoever ends this process need not bring it back."""
        return False


class _Log:
    """Anything else: a line now and then, and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next_s = time.monotonic() + LINE_S

    def draw(self, ticks: Ticks, machine: Machine) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LINE_S
            self.close(ticks, machine)

    def close(self, ticks: Ticks, machine: Machine) -> None:
        print(line(ticks, machine), file=self._stream, flush=True)
