"""What can go wrong, and the exit code each kind ends with. Only `cli/` catches these.

    VlaoptError                  exit code
    ├── InputError               2   the recipe, checkpoint, calibration set, artifact or command is wrong
    │   └── RecipeError          2   every problem of one recipe at once
    ├── EnvironmentProblem       3   this machine, environment or target cannot do what was asked
    ├── StageError               4   a stage failed
    └── GateError                5   a gate or an assertion was missed

Anything else that escapes is a bug in vlaopt (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence


class VlaoptError(Exception):
    """One thing that went wrong: what (one line), where (path or `file:line:key`), and how to mend it."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def lines(self) -> list[str]:
        """The error as it is printed: the problem, then its hint."""
        return [str(self), *([f"hint: {self.hint}"] if self.hint else [])]


class InputError(VlaoptError):
    """What the user gave is wrong."""

    exit_code = 2


class RecipeError(InputError):
    """All problems of one recipe, in the order of its lines."""

    def __init__(self, problems: Sequence[InputError]) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the recipe")
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)

    def lines(self) -> list[str]:
        return [line for problem in self.problems for line in problem.lines()]


class EnvironmentProblem(VlaoptError):
    """This machine, environment or target cannot do what was asked."""

    exit_code = 3


class StageError(VlaoptError):
    """A stage failed on input that was acceptable."""

    exit_code = 4


class GateError(VlaoptError):
    """A gate or an assertion was missed."""

    exit_code = 5
