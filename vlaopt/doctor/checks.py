"""One thing that is needed, beside what is here and the command that mends it; and the verdict of several."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Task = Literal["finish", "run"]
"""`finish`: build an engine from portable graphs, as `vlaopt engine` does. `run`: open an engine and predict."""


class Check(BaseModel):
    """`holds` None: it cannot be told here, and stops nothing. `tasks` are those that need it.

    `mend` is the command or deed that helps, `brief` the reason in a few words where have and need are long.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    have: str
    need: str
    holds: bool | None
    mend: str | None = None
    brief: str | None = None
    tasks: tuple[Task, ...] = ("finish", "run")

    @property
    def short(self) -> str:
        """As a reason: `GPU: Orin, SM 8.7; needed: SM 11.0`."""
        return self.brief or f"{self.what}: {self.have}; needed: {self.need}"

    def blocks(self, task: Task) -> bool:
        return self.holds is False and task in self.tasks


class Verdict(BaseModel):
    """Whether this machine will do what it was asked about, in a sentence, and the checks that say why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    will: bool
    sentence: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def blocked(checks: tuple[Check, ...], task: Task) -> list[Check]:
    """The checks that keep this machine from `task`."""
    return [check for check in checks if check.blocks(task)]
