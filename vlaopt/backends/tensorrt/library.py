"""The Python module that drives TensorRT, classic or for RTX: what is there, why it cannot be imported, its version."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from vlaopt.errors import EnvironmentProblem
from vlaopt.optional import installed_version, require


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's modules: what it is called in messages, what it is imported as, and what installs it.

    `distributions` are those that may bring it; with `of_system` a package of the system may instead, whose version
    the module itself tells best.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    extra: str
    of_system: bool = False

    @property
    def hint(self) -> str:
        return f"pip install 'vlaopt[{self.extra}]'"

    def missing(self) -> str | None:
        """None when the module is there, else the reason in one line. Imports nothing."""
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed: {self.hint}"

    def problem(self) -> str | None:
        """None when the module can be imported, else the reason in one line: a library it links to may be absent."""
        if reason := self.missing():
            return reason
        try:
            importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            return f"{self.module} cannot be imported: {' '.join(str(error).split())}"
        return None

    def load(self) -> ModuleType:
        """The module. Raises EnvironmentProblem where it cannot be imported."""
        return require(self.module, self.extra)

    def version(self) -> str:
        """Such as '10.13.3.9'; three parts where a system package tells no more. Raises EnvironmentProblem."""
        found = None if self.of_system else self._distributed()
        if found is None and self.problem() is None:
            found = getattr(self.load(), "__version__", None)
        found = found or self._distributed()
        if found is None:
            raise EnvironmentProblem(self.problem() or f"{self.module} tells no version", hint=self.hint)
        return str(found)

    def _distributed(self) -> str | None:
        return next(filter(None, map(installed_version, self.distributions)), None)


CLASSIC = Library("TensorRT", "tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt", of_system=True)
RTX = Library(
    "TensorRT for RTX",
    "tensorrt_rtx_bindings",
    ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "rtx",
)


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: '10.13.3.9' as (10, 13, 3, 9)."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
