"""What each backend says of this machine: whether it is installed, whether its engines run, what it has for them.

They are asked in a process of their own: a library that is broken may end the process that loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from vlaopt import backends, isolated
from vlaopt.backends import Backend
from vlaopt.errors import EnvironmentProblem, StageError, VlaoptError

T = TypeVar("T")


class State(BaseModel):
    """One backend here. `missing` is why it cannot build, `problem` why its engines cannot run; None: it can.

    `machine` is what engines may need of it, by the names of `Engine.needs`. One that is not `timed` gives actions
    alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str | None = None
    missing: str | None = None
    problem: str | None = None
    machine: dict[str, str] = {}
    timed: bool = True


def probe_all(names: Iterable[str] | None = None) -> dict[str, State]:
    """The state of every backend that is known here, by name. One whose library ends its process does not run."""
    left = list(backends.names() if names is None else names)
    found: dict[str, State] = {}

    def told(state: State) -> None:
        found[state.name] = state

    while left:
        try:
            isolated.run(_probe_these, left, what="asking it", told=told)
        except StageError as error:
            culprit = next(name for name in left if name not in found)
            found[culprit] = State(name=culprit, missing=error.message, problem=error.message)
        except EnvironmentProblem:  # no process can be started here: better asked in this one than not at all
            found |= {name: probe(name) for name in left if name not in found}
        left = [name for name in left if name not in found]
    return found


def _probe_these(tell: Callable[[State], None], names: list[str]) -> None:
    for name in names:
        tell(probe(name))


def state_of(name: str, states: Mapping[str, State]) -> State:
    """The state of a backend, also of one that nobody here knows."""
    unknown = "not in this vlaopt"
    return states.get(name) or State(name=name, missing=unknown, problem=unknown)


def probe(name: str) -> State:
    """The state of one backend. One that fails at the question is one that cannot be used, with its failure said."""
    try:
        library = backends.get(name)
    except Exception as error:  # a plug-in may fail in any way while it is imported
        return State(name=name, missing=_reason(error), problem=_reason(error))
    missing, trouble = _asked(library.missing)
    if trouble or missing:
        return State(name=name, missing=trouble or missing, problem=trouble or missing)
    problem, trouble = _asked(library.runnable)
    version, _ = _asked(library.version)
    machine, _ = _asked(lambda: _machine(library))
    timed, _ = _asked(lambda: library.timed)
    return State(
        name=name, version=version, problem=trouble or problem, machine=machine or {}, timed=timed is not False
    )


def _machine(library: Backend) -> dict[str, str]:
    return dict(library.machine())


def _asked(question: Callable[[], T]) -> tuple[T | None, str | None]:
    """The answer and why there is none: whatever a library raises, the others are asked still."""
    try:
        return question(), None
    except Exception as error:
        return None, _reason(error)


def _reason(error: Exception) -> str:
    text: Any = error.message if isinstance(error, VlaoptError) else f"{type(error).__name__}: {error}"
    return " ".join(str(text).split())
