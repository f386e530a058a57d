"""Changes to a machine that are undone in every case, also when the process that made them is killed.

A process of its own does the undoing: it waits until its pipe is closed, which happens however the other one ends.
"""

from __future__ import annotations

import json
import pickle
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from vlaopt.errors import EnvironmentProblem

PATIENCE_S = 60.0
"""A command that takes longer is given up: nvidia-smi loads the driver where nothing keeps it."""

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vlaopt.machine.changes import _guard; _guard()"


@dataclass(frozen=True)
class Write:
    """`text` written to a file that is there, as those of /sys are."""

    path: Path
    text: str

    def take(self) -> str | None:
        """Do it; gives the reason why it could not be done."""
        try:
            self.path.write_text(self.text)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def __str__(self) -> str:
        return f"echo {self.text} > {self.path}"


@dataclass(frozen=True)
class Command:
    """A program and its arguments."""

    words: tuple[str, ...]

    def take(self) -> str | None:
        """Run it; gives the reason why it failed, the first line that it printed."""
        try:
            done = subprocess.run(
                self.words,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE_S,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        said = f"{done.stderr}\n{done.stdout}".strip().splitlines()
        return None if done.returncode == 0 else (said[0] if said else f"exit code {done.returncode}")

    def __str__(self) -> str:
        return shlex.join(self.words)


Step = Write | Command


@dataclass
class Changes:
    """What was changed so far. `folder` is empty at first and removed at the end."""

    folder: Path
    _undoing: IO[bytes]
    _undos: list[Step] = field(default_factory=list)
    _refused: list[Step] = field(default_factory=list)

    def make(self, step: Step, undo: Step | None = None) -> str | None:
        """Take a step; `undo` is taken at the end, also when the step failed half-way. Gives why it failed.

        Raises EnvironmentProblem, with nothing taken, when the undoing process is gone.
        """
        if undo is not None:
            self._undos.append(undo)
            try:
                _send(self._undoing, undo)
            except OSError as error:
                raise EnvironmentProblem("the process that undoes changes was ended") from error
        reason = step.take()
        if reason is not None and undo is not None:
            self._refused.append(undo)
        return reason


@contextmanager
def undone(claim: int) -> Iterator[Changes]:
    """Changes that are undone, the last first, when this block is left or this process ends.

    `claim` is a file descriptor that the undoing process keeps open until it is done. Raises EnvironmentProblem where
    that process cannot be started, and, at the end, with what could not be undone and the commands for it.
    """
    process = _started(claim)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        changes = Changes(Path(pickle.load(process.stdout)), process.stdin)
    except EOFError as error:
        raise EnvironmentProblem(f"changes cannot be undone here: that process ended ({process.wait()})") from error
    try:
        yield changes
    finally:
        with suppress(OSError):
            process.stdin.close()
        try:
            failed = pickle.load(process.stdout)
        except EOFError:  # that process was killed, so that this one has to
            failed = _undo(changes._undos)
        process.stdout.close()
        process.wait()
        if left := [str(step) for step in failed if step not in changes._refused]:
            raise EnvironmentProblem(
                "this machine could not be given back as it was", hint=f"as root: {'; '.join(left)}"
            )


def _started(claim: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[claim],
            start_new_session=True,  # not ended together with the group of this one
        )
    except OSError as error:
        raise EnvironmentProblem(f"no process can be started that undoes changes: {error}") from error


def _guard() -> None:
    """What the other process does: collect what is to be undone until there is nobody who sends more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    undos: list[Step] = []
    with TemporaryDirectory(prefix="vlaopt-", ignore_cleanup_errors=True) as folder:
        _send(sys.stdout.buffer, folder)
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                undos.append(pickle.load(sys.stdin.buffer))
        failed = _undo(undos)
    with suppress(BrokenPipeError):
        _send(sys.stdout.buffer, failed)


def _undo(steps: Sequence[Step]) -> list[Step]:
    """Takes them, the last first; gives those that failed."""
    return [step for step in reversed(steps) if step.take() is not None]


def _send(pipe: IO[bytes], value: Any) -> None:
    pickle.dump(value, pipe)
    pipe.flush()
