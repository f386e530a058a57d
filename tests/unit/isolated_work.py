"""What tests have done in a process of its own: functions of a module, as `vlaopt.isolated.run` takes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlaopt.errors import EnvironmentProblem, InputError, RecipeError
from vlaopt.isolated import Caller


def add(tell: Any, first: int, second: int) -> tuple[int, int]:
    for step in range(3):
        tell("adding", step)
    return first + second, os.getpid()


def read_all(caller: Caller, descriptor: int) -> None:
    caller(os.read(descriptor, 100))


def refuse(tell: Any) -> None:
    raise EnvironmentProblem("no room", where="here", hint="make some")


def refuse_a_recipe(tell: Any) -> None:
    raise RecipeError([InputError("one", where="a:1"), InputError("two", hint="mend it")])


def stumble(tell: Any) -> None:
    raise KeyError("a bug")


def raise_what_cannot_be_sent(tell: Any) -> None:
    class Own(Exception):
        pass

    raise Own("of this function alone")


def run_out_of_memory(tell: Any) -> None:
    raise MemoryError


def die(tell: Any, name: str) -> None:
    sys.stderr.write("first\n\nsecond\nthird\nlast words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.Signals[name])
    time.sleep(60)


def leave(tell: Any, code: int) -> None:
    print("on stdout")  # noqa: T201
    sys.stdout.flush()
    os._exit(code)


def litter(tell: Any) -> str:
    folder = tempfile.mkdtemp()
    tell(folder)
    os.kill(os.getpid(), signal.SIGKILL)
    return folder


def linger(tell: Any, note: Path) -> None:
    """Writes down its own process and one it starts, and stays."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    note.with_suffix(".part").write_text(f"{os.getpid()} {other.pid}")
    note.with_suffix(".part").rename(note)
    time.sleep(120)


def count(caller: Caller, number: int) -> None:
    """Says where it starts, and then the next number whenever it is asked."""
    caller("from", number)
    while caller.asks(60):
        caller(number)
        number += 1


def linger_mutely(caller: Caller) -> None:
    time.sleep(120)
