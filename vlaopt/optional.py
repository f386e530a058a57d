"""Libraries that only some installs have: look for them when needed, and say which extra brings them."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from vlaopt.errors import EnvironmentProblem


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise EnvironmentProblem naming the extra of vlaopt that installs it.

    OSError counts as missing too: a container may hold a library without the driver it links to.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"{module} cannot be imported: {error}", hint=f"pip install 'vlaopt[{extra}]'"
        ) from error


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution without importing it, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
