"""Where facts about a machine come from: its files, commands and Python libraries. Tests give others."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from vlaopt.machine.system import ROOT
from vlaopt.optional import installed_version

PATIENCE_S = 10.0
"""A command that takes longer is given up: `nvidia-smi` hangs where a driver does."""

Run = Callable[[Sequence[str]], "str | None"]


def run_command(command: Sequence[str]) -> str | None:
    """What `command` prints, or None where there is none such, it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def import_library(name: str) -> ModuleType | None:
    """The module, or None where it cannot be imported, whatever the reason."""
    try:
        return importlib.import_module(name)
    except Exception:  # a library that is broken, or built for another machine, is one that is not there
        return None


@dataclass(frozen=True)
class Sources:
    """All that is read of a machine: files below `root`, what commands print, versions of distributions, modules.

    `variables` are those of the environment.
    """

    root: Path = ROOT
    run: Run = run_command
    installed: Callable[[str], str | None] = installed_version
    load: Callable[[str], ModuleType | None] = import_library
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    system: str = platform.system()
    architecture: str = platform.machine()
    python: str = platform.python_version()
