"""`make check-310` would find code that the Python of JetPack 6 does not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vermin", reason="needs vlaopt[dev]")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    pass\nexcept* ValueError:\n    pass\n",
        "type Name = str\n",
        "from datetime import UTC\n",
        "import tomllib\n",
        "from typing import Self\n",
    ],
    ids=["except*", "type statement", "datetime.UTC", "tomllib", "typing.Self"],
)
def test_newer_code_is_found(code: str, tmp_path: Path) -> None:
    vermin = Path(sys.executable).with_name("vermin")  # it has no `python -m`
    command = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "/vermin " in line)
    arguments = command.split("/vermin ")[1].replace("vlaopt", str(tmp_path / "newer.py")).split()
    (tmp_path / "newer.py").write_text(code)
    done = subprocess.run([vermin, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (tmp_path / "newer.py").write_text("match 1:\n    case _:\n        pass\n")
    done = subprocess.run([vermin, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
