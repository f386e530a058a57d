"""What the system's package manager has installed: Debian's own list, which JetPack and Ubuntu keep."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vlaopt.machine.system import field, read_text


def installed_packages(root: Path) -> dict[str, str]:
    """Versions of the installed Debian packages by name; empty where there is no such list."""
    blocks = (read_text(root / "var/lib/dpkg/status") or "").split("\n\n")
    found = {}
    for block in blocks:
        name, version, status = field(block, "Package"), field(block, "Version"), field(block, "Status")
        if name and version and (status or "").endswith(" installed"):
            found[name] = version
    return found


def upstream(version: str) -> str:
    """A package's version without what its packaging adds: 10.3.0.30-1+cuda12.5 is 10.3.0.30, 6.2+b77 is 6.2."""
    return re.split(r"[-+~]", version.partition(":")[2] or version)[0]


def version_of(packages: Mapping[str, str], pattern: str) -> str | None:
    """The highest upstream version of the packages whose whole name matches `pattern`."""
    found = [upstream(version) for name, version in packages.items() if re.fullmatch(pattern, name)]
    return max(found, key=numbers, default=None)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))
