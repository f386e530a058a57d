"""Libraries that only some installs have, and plug-ins: looked for when needed, and what brings them is said."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
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


def plugin_sources(group: str, name: str) -> dict[str, Path]:
    """The Python files of the package behind an entry point, by their paths in it; empty without such an entry point.

    The package is not imported. One that is installed in place for editing counts as it is now.
    """
    entry = next((entry for entry in importlib.metadata.entry_points(group=group) if entry.name == name), None)
    spec = importlib.util.find_spec(entry.module.partition(".")[0]) if entry else None
    if spec is None:
        return {}
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    return files or {spec.name: Path(spec.origin or "")}
