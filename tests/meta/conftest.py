"""What the meta tests share: where the project lies, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the project."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture
def python(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a fresh Python with these arguments, on one thread, without colours, on an empty store."""
    store = tmp_path_factory.mktemp("store")

    def run(*arguments: str, cwd: Path = root) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
        environment = {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "VLAOPT_STORE": str(store)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)

    return run
