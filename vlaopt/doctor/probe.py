"""What each backend says of this machine: whether it is installed, whether its engines run, what it has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from vlaopt import backends
from vlaopt.backends import Backend
from vlaopt.errors import VlaoptError

T = TypeVar("T")


class State(BaseModel):
    """One backend here. `missing` is why it cannot build, `problem` why its engines cannot run; None: it can.

    `machine` is what engines may need of it, by the names of `Engine.needs`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str | None = None
    missing: str | None = None
    problem: str | None = None
    machine: dict[str, str] = {}

    @property
    def has_tensorrt(self) -> str | None:
        """The version of classic TensorRT that it drives."""
        return self.machine.get("tensorrt")


def probe_all(names: Iterable[str] | None = None) -> dict[str, State]:
    """The state of every backend that is known here, by name."""
    return {name: probe(name) for name in (backends.names() if names is None else names)}


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
    return State(name=name, version=version, problem=trouble or problem, machine=machine or {})


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
