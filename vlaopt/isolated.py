"""A function in a process of its own, waited for or beside: what crashes or is killed there is one clear error here.

No such process outlives the one that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

from vlaopt.errors import EnvironmentProblem, StageError, VlaoptError

Result = TypeVar("Result")
Tell = Callable[..., None]

_TOLD, _RETURNED, _RAISED = "told", "returned", "raised"
_LAST_LINES, _LAST_BYTES = 3, 4096
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""
# Not multiprocessing's own start: that would run the user's script again, up to the line that came here.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vlaopt.isolated import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class ChildTraceback(Exception):
    """Where an error was raised in the other process; the cause of what is raised here."""


class Caller:
    """The process that started this one, as the function in it meets it: called with values, it is told those."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self, *values: Any) -> None:
        self._connection.send((_TOLD, values))

    def asks(self, within_s: float) -> bool:
        """Whether it wants to be told something within so many seconds. Raises EOFError when it has ended."""
        if not self._connection.poll(within_s):
            return False
        self._connection.recv()
        return True


class Beside:
    """A process that runs while this one does something else; see `beside`."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection, log: Path, what: str) -> None:
        self._process = process
        self._connection = connection
        self._log = log
        self._what = what

    @property
    def process(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has neither ended nor been killed."""
        return self._process.poll() is None

    def ask(self, patience_s: float) -> tuple[Any, ...]:
        """What it tells on being asked; see `Caller.asks`, and `heard` for errors."""
        with suppress(ConnectionError):  # why it is gone is found when its answer is missing
            self._connection.send(None)
        return self.heard(patience_s)

    def heard(self, patience_s: float) -> tuple[Any, ...]:
        """The values it tells next. Raises what it raises, and StageError when it dies or is silent for so long."""
        try:
            if not self._connection.poll(patience_s):
                raise StageError(f"{self._what} gave no answer in {patience_s:g} s")
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError) as end:
            raise _death(self._what, None, self._process.wait(), self._log) from end
        if kind == _RAISED:
            error, trace = value
            raise error from ChildTraceback(trace)
        if kind == _RETURNED:
            raise _death(self._what, None, self._process.wait(), self._log)
        told: tuple[Any, ...] = value
        return told


@contextmanager
def beside(
    function: Callable[..., object], *arguments: Any, what: str, descriptors: Sequence[int] = ()
) -> Iterator[Beside]:
    """`function(caller, *arguments)` in a new process while the body runs, which ends it; `caller` is a `Caller`.

    `function`, arguments, `what`, and what becomes of the process as with `run`. `descriptors` are files that are open
    there too, by the same numbers, which are none of the standard ones.
    """
    with _started(what, descriptors) as (process, connection, log):
        with suppress(ConnectionError):  # `heard` says why it is gone
            connection.send((function, arguments))
        yield Beside(process, connection, log, what)


def run(
    function: Callable[..., Result],
    *arguments: Any,
    what: str,
    told: Callable[..., object] | None = None,
    hint: str | None = None,
) -> Result:
    """`function(tell, *arguments)` in a new process; gives what it returns and raises what it raises.

    `function` is one of a module, arguments and result can be pickled; large ones belong into files. What it passes to
    `tell` goes to `told` here while it runs. `what` says in errors what ran, such as "the builder", and `hint` what
    helps when that dies. Raises StageError when the process dies, with the last lines it wrote. It never outlives this
    call or this process, and its temporary files go with it.
    """
    with _started(what) as (process, connection, log):
        try:
            connection.send((function, arguments))
            while True:
                kind, value = connection.recv()
                if kind == _RETURNED:
                    result: Result = value
                    return result
                if kind == _RAISED:
                    error, trace = value
                    raise error from ChildTraceback(trace)
                if told is not None:
                    told(*value)
        except (EOFError, ConnectionError) as error:
            raise _death(what, hint, process.wait(), log) from error


def leave_real_time() -> None:
    """Run as programs usually do: a real-time class, which a control loop may have, comes to its children too.

    There one that never rests would keep all others off its core.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # where the machine forbids it, the process stays what it was started as
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def serve(parent: int, descriptor: int) -> None:
    """The other end of `run` and `beside`, in the process they start."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    connection: Connection = Connection(descriptor)
    function, arguments = connection.recv()
    try:
        answer: tuple[str, Any] = (_RETURNED, function(Caller(connection), *arguments))
    except Exception as error:
        answer = (_RAISED, (_sendable(error), traceback.format_exc()))
    connection.send(answer)


@contextmanager
def _started(what: str, descriptors: Sequence[int] = ()) -> Iterator[tuple[subprocess.Popen[bytes], Connection, Path]]:
    """The process, the connection to it, and the file that its output goes to; all are gone afterwards."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="vlaopt-", ignore_cleanup_errors=True)
    except OSError as error:
        raise EnvironmentProblem(f"no temporary folder can be made: {error}", hint="set TMPDIR") from error
    with scratch as folder:
        log = Path(folder) / "log"
        here, there = Pipe()
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(os.getpid()), str(there.fileno())]
        with here, log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[there.fileno(), *descriptors],
                    env={**os.environ, "TMPDIR": folder},
                    start_new_session=True,  # a group of its own, which ends as a whole
                )
            except OSError as error:
                raise EnvironmentProblem(f"no process can be started for {what}: {error}") from error
            finally:
                there.close()
            try:
                yield process, here, log
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, where it can; end at once when that is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _sendable(error: Exception) -> Exception:
    """`error`, or what stands for it where it cannot be pickled; memory that ran out is no bug."""
    if isinstance(error, MemoryError):
        return StageError(f"memory ran out: {error}" if str(error) else "memory ran out", hint=_MEMORY)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # what an error's own class does there may raise anything; its text still arrives
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_MEMORY = "close what else needs memory (the desktop, other programs) or add swap, then run it again"


def _death(what: str, hint: str | None, code: int, log: Path) -> VlaoptError:
    said = _last_lines(log)
    last = f"; the last it wrote: {said}" if said else ""
    if code == -signal.SIGKILL:
        return StageError(
            f"{what} was killed, probably for memory{last}", hint="; ".join(filter(None, [_MEMORY, hint]))
        )
    if code < 0:
        return StageError(f"{what} crashed ({signal.Signals(-code).name}){last}", hint=hint)
    return StageError(f"{what} ended with exit code {code} and no result{last}", hint=hint)


def _last_lines(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _LAST_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-_LAST_LINES:])
